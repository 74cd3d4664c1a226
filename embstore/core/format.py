"""The on-disk contract, format version 1: names, JSON records, journal lines. Pure: bytes in, values out, no files.

``docs/format.md`` states the same in MUST and MAY sentences. Who writes what, and in which order, is storage's concern.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from embstore.core.errors import CorruptStoreError, FieldMismatch, IdentityMismatchError

FORMAT_VERSION = 1

SPEC = "spec.json"
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
RUNS = "runs.jsonl"
LOCK = ".lock"
WORK = "work"
PROMPTS = "prompts.jsonl"
IDS = "ids.json"
ALIASES = "aliases.json"
PROMPTS_LIST = "prompts_list.json"
QUARANTINE = "quarantine.jsonl"
LINE_ROWS = "line_rows.npy"
MULTIPLICITY = "multiplicity.npy"
KEYS = "keys.npy"
BASIS = "basis.npy"
COORDINATES = "coordinates.npy"
RESIDUALS = "residuals.npy"
EMBEDDINGS = "embeddings.zarr"
ARRAY_METADATA = "embeddings.zarr/zarr.json"
CHUNKS = "chunks.json"
NEIGHBORS = "neighbors"
WEIGHTS = "weights"
WEIGHTS_LINK = "density_weights.npy"
METADATA_LINK = "embeddings_metadata.json"

STAGE0_FILES = (PROMPTS, IDS, ALIASES, PROMPTS_LIST, QUARANTINE, LINE_ROWS, MULTIPLICITY, KEYS)

JsonObject = dict[str, Any]
_Record = TypeVar("_Record")


def chunk_name(index: int) -> str:
    """File of chunk ``index``, relative to the store: Zarr v3 default key encoding with separator '.'."""
    return f"{EMBEDDINGS}/c.{index}.0"


def canonical_json(value: object) -> str:
    r"""One spelling per value: sorted keys, no spaces, ASCII. Digests are taken over this.

    Examples
    --------
    >>> canonical_json({"b": 1, "a": [1.0, "é"]})
    '{"a":[1.0,"\\u00e9"],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def document(value: object) -> bytes:
    """A JSON file for people and programs: indented, keys in the order given, newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """Size and sha256 of a file, made while it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Which model and tokenizer made the rows. ``name`` is for people (no path); the digests decide."""

    name: str
    architecture: str
    revision: str | None
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingSpec:
    """Everything about the embedding pass that changes a byte, resolved.

    ``dimension`` is V, ``rank`` is R. ``head`` is "affine" (pooled before the head) or "streamed"; ``head_scale`` the factor
    a class applies after its head.
    """

    dimension: int
    rank: int
    columns: str
    head: str
    head_scale: float
    pooling: str
    normalization: str
    token_rule: str
    max_tokens: int
    batch_tokens: int
    dtype: str
    device: str
    capability: str
    threads: int
    basis: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSpec:
    """``spec.json``: the identity of a store, written once, before row 0."""

    format_version: int
    rows: int
    prompts_fingerprint: str
    model: ModelIdentity
    embedding: EmbeddingSpec
    window_rows: int
    chunk_rows: int
    compressor: str
    basis_sha256: str


def check_format_version(found: object, *, name: str) -> None:
    """Refuse a store of another format version before reading anything else of it."""
    if found != FORMAT_VERSION:
        raise IdentityMismatchError(
            [FieldMismatch(field=f"format_version in {name}", stored=found, given=FORMAT_VERSION)],
            hint="use the embstore release that wrote this store, or build it anew",
        )


def parse_document(content: bytes, *, name: str) -> JsonObject:
    """A JSON object from a store file; damage is a CorruptStoreError, another version an IdentityMismatchError."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise CorruptStoreError(f"{name} is no JSON ({error})", hint="run embstore verify STORE") from error
    if not isinstance(value, dict):
        raise CorruptStoreError(f"{name} holds no JSON object", hint="run embstore verify STORE")
    if "format_version" in value:
        check_format_version(value["format_version"], name=name)
    return value


def from_json(record_type: type[_Record], value: object, *, name: str) -> _Record:
    """A frozen record from parsed JSON, nested records included; fields must match exactly.

    Raises
    ------
    CorruptStoreError
        A field is missing, unknown, or of another JSON type.
    """
    if not isinstance(value, dict):
        raise CorruptStoreError(f"{name}: expected an object, found {type(value).__name__}")
    hints = typing.get_type_hints(record_type)
    if set(value) != set(hints):
        unlike = sorted(set(value) ^ set(hints))
        raise CorruptStoreError(f"{name}: fields missing or unknown: {', '.join(unlike)}", hint="run embstore verify STORE")
    return record_type(**{field: _convert(hints[field], value[field], f"{name}.{field}") for field in hints})


def _convert(hint: Any, value: Any, name: str) -> Any:  # noqa: ANN401 - type hints are data here
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, name=name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    expected: Any = origin if origin in (list, dict) else float | int if hint is float else hint
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        raise CorruptStoreError(f"{name}: expected {hint}, found {type(value).__name__}", hint="run embstore verify STORE")
    if origin is list:
        return [_convert(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        return {key: _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    return value


def diff_fields(stored: object, given: object, *, prefix: str = "") -> list[FieldMismatch]:
    """Leaf fields in which two records of one type differ, with dotted names."""
    mismatches: list[FieldMismatch] = []
    for entry in dataclasses.fields(stored):  # type: ignore[arg-type]  # both are records
        left, right = getattr(stored, entry.name), getattr(given, entry.name)
        if dataclasses.is_dataclass(left) and type(left) is type(right):
            mismatches += diff_fields(left, right, prefix=f"{prefix}{entry.name}.")
        elif left != right:
            mismatches.append(FieldMismatch(field=f"{prefix}{entry.name}", stored=left, given=right))
    return mismatches


def weights_paths(digest: str) -> tuple[str, str]:
    """Array and sidecar of one weighting, relative to the store."""
    return f"{WEIGHTS}/{digest}.npy", f"{WEIGHTS}/{digest}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighborsPaths:
    """Files of one neighbour graph, relative to the store.

    ``ids`` int32 [N, K_max], ``distances`` float32 [N, K_max], ``groups`` int32 [N] (the first row with the same vector, -1
    for failed rows), ``spec`` how they were found.
    """

    ids: str
    distances: str
    groups: str
    spec: str


def neighbors_paths(digest: str) -> NeighborsPaths:
    """Files of the neighbour graph ``digest``."""
    folder = f"{NEIGHBORS}/{digest}"
    return NeighborsPaths(
        ids=f"{folder}/ids.npy",
        distances=f"{folder}/distances.npy",
        groups=f"{folder}/groups.npy",
        spec=f"{folder}/spec.json",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """``manifest.json``: the artefact's only flip. Readers follow it and nothing else.

    ``files`` covers every listed file; ``neighbors`` and ``weights`` are digests that name files under those folders;
    ``names`` maps a weighting's name to its digest ("default" is what ``density_weights.npy`` links to).
    """

    format_version: int
    rows: int
    dimension: int
    neighbors: str
    names: dict[str, str]
    files: dict[str, FileDigest]

    def encode(self) -> bytes:
        """The file's bytes, with names in sorted order."""
        value = dataclasses.asdict(self)
        value["names"] = dict(sorted(self.names.items()))
        value["files"] = {name: dataclasses.asdict(self.files[name]) for name in sorted(self.files)}
        return document(value)


def decode_manifest(content: bytes) -> Manifest:
    """Read ``manifest.json``; one that does not list what it publishes is a CorruptStoreError."""
    manifest = from_json(Manifest, parse_document(content, name=MANIFEST), name=MANIFEST)
    paths = neighbors_paths(manifest.neighbors)
    needed = [paths.ids, paths.distances, paths.groups, paths.spec]
    needed += [path for digest in manifest.names.values() for path in weights_paths(digest)]
    missing = sorted(
        {*needed, *STAGE0_FILES, SPEC, BASIS, ARRAY_METADATA, COORDINATES, RESIDUALS, CHUNKS} - set(manifest.files)
    )
    if "default" not in manifest.names:
        missing.append("default weights")
    if missing:
        raise CorruptStoreError(f"{MANIFEST} does not list {', '.join(missing)}", hint="run embstore verify STORE")
    return manifest


def decode_spec(content: bytes) -> StoreSpec:
    """Read ``spec.json``."""
    return from_json(StoreSpec, parse_document(content, name=SPEC), name=SPEC)


def array_metadata(spec: StoreSpec) -> bytes:
    """``zarr.json`` of the embedding array: float16 [N, V], NaN fill, crc32c last so that it covers the stored bytes."""
    codecs: list[JsonObject] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if spec.compressor == "lz4":
        blosc = {"typesize": 2, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
        codecs.append({"name": "blosc", "configuration": blosc})
    codecs.append({"name": "crc32c"})
    grid = {"chunk_shape": [spec.chunk_rows, spec.embedding.dimension]}
    return document(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [spec.rows, spec.embedding.dimension],
            "data_type": "float16",
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": "NaN",
            "codecs": codecs,
            "attributes": {},
            "dimension_names": ["row", "vocabulary"],
        }
    )
