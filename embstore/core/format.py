"""The on-disk contract, format version 1: names, JSON records, journal lines. Pure: bytes in, values out, no files.

``docs/format.md`` says the same in MUST and MAY sentences. ``storage`` decides who writes what, and in which order.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import CURRENT_RULE, FIRST_RULE, USUAL_FIELDS, PromptFields, PromptRule
from embstore.core.decode import Sha256, from_json, parse_json, printable, shown
from embstore.core.errors import ConfigError, CorruptStoreError, FieldMismatch, IdentityMismatchError

FORMAT_VERSION = 1

SPEC = "spec.json"
MANIFEST = "manifest.json"
WITHDRAWN = "manifest.withdrawn.json"  # the manifest that a repair took back, until the next publication
JOURNAL = "journal.jsonl"
RUNS = "runs.jsonl"
LOCK = ".lock"
WORK = "work"
PROMPTS = "prompts.jsonl"
IDS = "ids.json"
ALIASES = "aliases.json"
PROMPTS_LIST = "prompts_list.json"
QUARANTINE = "quarantine.jsonl"
REFUSED = "refused.jsonl"  # chats that the model's template refuses
LINE_ROWS = "line_rows.npy"
MULTIPLICITY = "multiplicity.npy"
KEYS = "keys.npy"
BASIS = "basis.npy"
COORDINATE_MAP = "coordinate_map.npy"
COORDINATES = "coordinates.npy"
RESIDUALS = "residuals.npy"
SEQUENCES = "sequences.npy"
EMBEDDINGS = "embeddings.zarr"
ARRAY_METADATA = "embeddings.zarr/zarr.json"
CHUNKS = "chunks.json"
NEIGHBORS = "neighbors"
WEIGHTS = "weights"
WEIGHTS_LINK = "density_weights.npy"
METADATA_LINK = "embeddings_metadata.json"
ROWS_COPY = "embeddings.npy"  # not of the store: see storage.rows_copy

STAGE0_FILES = (PROMPTS, IDS, ALIASES, PROMPTS_LIST, QUARANTINE, LINE_ROWS, MULTIPLICITY, KEYS)

# Limits on what an untrusted store may ask of a reader. A spec within them fits its journal.
MAX_ROWS = (1 << 31) - 1  # rows are int32 in the neighbour graph
MAX_COLUMNS = 1 << 24
MAX_WINDOWS = 1 << 18
MAX_CHUNKS = 1 << 20
MAX_CHUNK_BYTES = (1 << 31) - 32  # decoded: the limit of blosc; also for the coordinates of one window
LARGEST_COORDINATE = 2.0  # absolute value of a coordinate or residual of a unit row, with a margin for rounding
DOCUMENT_BYTES = 16 << 20  # spec, manifest, metadata, zarr.json
TABLE_BYTES = 64 << 20  # chunks.json
JOURNAL_BYTES = 256 << 20
JOURNAL_LINE_BYTES = 16 << 20
WEIGHTS_TOLERANCE = 1e-6  # of their float64 sum

DEFAULT_WEIGHTS = "default"  # the weighting that training maps

JsonObject = dict[str, Any]
# names files that were made from the same content; in a path it is always one plain word
Digest = Annotated[str, re.compile(r"[0-9a-f]{16}")]
_Result = TypeVar("_Result")

_NAME_CHARACTERS = 200
_WITH_DIGEST = re.compile(r"(.+)@([0-9a-f]{16})")
_NAMES_SHOWN = 32


def basis_file(basis: str) -> str:
    """Where a store with this ``embedding.basis`` says what coordinates are: ``BASIS`` [V, R], ``COORDINATE_MAP`` [M, R]."""
    return COORDINATE_MAP if basis == "gram" else BASIS


def chunk_name(index: int) -> str:
    """File of chunk ``index``, relative to the store: Zarr v3 default key encoding with separator '.'."""
    return f"{EMBEDDINGS}/c.{index}.0"


def canonical_json(value: object) -> str:
    r"""JSON with one spelling per value: sorted keys, no spaces, ASCII. Digests are computed over it.

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
    sha256: Sha256


def check_format_version(found: object, *, name: str) -> None:
    """Refuse a store of another format version before reading anything else of it."""
    if type(found) is not int or not 0 <= found < 1 << 31:
        raise CorruptStoreError(f"{name}: expected a format_version, found {shown(found)}", hint="run embstore verify STORE")
    if found != FORMAT_VERSION:
        raise IdentityMismatchError(
            [FieldMismatch(field=f"format_version in {name}", stored=found, given=FORMAT_VERSION)],
            hint="use the embstore release that wrote this store, or build it again",
        )


def check_rule(rule: object, *, name: str) -> None:
    """Refuse a rule of a newer release before reading anything else of it: it may give the same prompts other keys."""
    found = rule.get("version") if isinstance(rule, dict) else None
    if type(found) is not int or not FIRST_RULE.version <= found < 1 << 31:
        raise CorruptStoreError(
            f"{name}.rule: expected the version of a rule, found {shown(found)}", hint="run embstore verify STORE"
        )
    if found > CURRENT_RULE.version:
        raise IdentityMismatchError(
            [FieldMismatch(field=f"rule.version in {name}", stored=found, given=CURRENT_RULE.version)],
            hint="use the embstore release that wrote this store, or build it again",
        )


def parse_document(content: bytes, *, name: str) -> JsonObject:
    """A JSON object from a store file; damage is a CorruptStoreError, another version an IdentityMismatchError."""
    value = parse_json(content, name=name)
    if not isinstance(value, dict):
        raise CorruptStoreError(f"{name} is not a JSON object", hint="run embstore verify STORE")
    if "format_version" in value:
        check_format_version(value["format_version"], name=name)
    return value


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
    """``manifest.json``: its rename publishes everything at once, and readers follow nothing else.

    ``files`` has the digest of every listed file; ``neighbors`` is the digest that names the folder of the neighbour graph;
    ``names`` maps the name of a weighting to its digest (``density_weights.npy`` links to "default"); one that was replaced
    stays as ``NAME@DIGEST``. ``rule`` says how
    lines became prompts, and items of a dataset do, ``fields`` in which fields they were; the first stores of version 1
    record neither.
    """

    format_version: int
    rows: int
    dimension: int
    neighbors: Digest
    names: dict[str, Digest]
    files: dict[str, FileDigest]
    rule: PromptRule = FIRST_RULE
    fields: PromptFields = USUAL_FIELDS

    def weighting(self, name: str, *, store: object) -> Digest:
        """Digest of the weights called ``name``, which may be ``NAME@DIGEST`` before NAME gets other weights, too.

        Raises
        ------
        ConfigError
            ``store`` has no such weights.
        """
        if name in self.names:
            return self.names[name]
        pinned = _WITH_DIGEST.fullmatch(name)
        if pinned is not None and self.names.get(pinned[1]) == pinned[2]:
            return pinned[2]
        raise unknown_weights(name, self.names, store=store)

    def without(self, names: Collection[str]) -> Manifest:
        """The manifest without these weights, and without the files that no other name has."""
        kept = {name: digest for name, digest in self.names.items() if name not in names}
        gone = {path for name in names for path in weights_paths(self.names[name])}
        gone -= {path for digest in kept.values() for path in weights_paths(digest)}
        files = {path: digest for path, digest in self.files.items() if path not in gone}
        return dataclasses.replace(self, names=kept, files=files)

    def encode(self) -> bytes:
        """The file's bytes, with names in sorted order; rule 1 is not written, as before there were others."""
        value = dataclasses.asdict(self)
        if self.rule == FIRST_RULE:
            del value["rule"], value["fields"]
        value["names"] = dict(sorted(self.names.items()))
        value["files"] = {name: dataclasses.asdict(self.files[name]) for name in sorted(self.files)}
        return document(value)


def decode_manifest(content: bytes) -> Manifest:
    """Read ``manifest.json``; a manifest that lists fewer or more files than it publishes is a CorruptStoreError."""
    unrecorded = {"rule": dataclasses.asdict(FIRST_RULE), "fields": dataclasses.asdict(USUAL_FIELDS)}
    value = {**unrecorded, **parse_document(content, name=MANIFEST)}
    check_rule(value["rule"], name=MANIFEST)
    manifest = from_json(Manifest, value, name=MANIFEST)
    problem = _manifest_problem(manifest)
    if problem is not None:
        raise CorruptStoreError(f"{MANIFEST} {problem}", hint="run embstore verify STORE")
    return manifest


def _manifest_problem(manifest: Manifest) -> str | None:
    if not (0 < manifest.rows <= MAX_ROWS and manifest.dimension > 0):
        return f"publishes {manifest.rows} x {manifest.dimension}"
    if (unusable := next((name for name in manifest.names if not is_weights_name(name)), None)) is not None:
        return f"gives weights the invalid name {shown(unusable)}"
    basis = COORDINATE_MAP if COORDINATE_MAP in manifest.files else BASIS
    published = {*STAGE0_FILES, SPEC, basis, ARRAY_METADATA, COORDINATES, RESIDUALS, CHUNKS}
    published |= {SEQUENCES} & set(manifest.files)  # stores from before December 2026 have none
    published |= set(dataclasses.asdict(neighbors_paths(manifest.neighbors)).values())
    published |= {path for digest in manifest.names.values() for path in weights_paths(digest)}
    missing = sorted(published - set(manifest.files)) + ["default weights"] * (DEFAULT_WEIGHTS not in manifest.names)
    if missing:
        return f"does not list {', '.join(missing[:10])}"
    unlike = sorted(set(manifest.files) - published)
    return f"lists {shown(unlike[0])}, which is not a file of this store" if unlike else None


def is_weights_name(name: str) -> bool:
    """Whether a weighting may have this name: one line, without a slash."""
    return 0 < len(name) <= _NAME_CHARACTERS and "/" not in name and printable(name) == name


def superseded_name(name: str, digest: Digest) -> str:
    """Under which name weights stay listed once ``name`` has others: ``NAME@DIGEST``, where a long name is cut.

    Examples
    --------
    >>> superseded_name("default", "0123456789abcdef")
    'default@0123456789abcdef'
    """
    return f"{name[: _NAME_CHARACTERS - len(digest) - 1]}@{digest}"


def is_superseded_name(name: str) -> bool:
    """Whether a name is of the form that only ``superseded_name`` gives."""
    return _WITH_DIGEST.fullmatch(name) is not None


def unknown_weights(name: str, known: Iterable[str], *, store: object) -> ConfigError:
    """The refusal of a name that no weighting of a store has, with those that there are: given names first."""
    names = sorted(known, key=lambda each: (is_superseded_name(each), each))
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ConfigError(
        f"{store} has no weights called {shown(name)}; it has {', '.join(names[:_NAMES_SHOWN])}{more}",
        hint=f"embstore weights {store} --list describes them; embstore weights {store} --name NAME makes new ones",
    )


def follow_manifest(read: Callable[[], bytes], use: Callable[[Manifest], _Result]) -> _Result:
    """Call ``use`` with the manifest that ``read`` returns, and again if a writer replaced the manifest meanwhile.

    A writer deletes files that only the old manifest lists after it published the new one, so a missing file is damage only
    if the manifest is still the same.
    """
    content = read()
    while True:
        try:
            return use(decode_manifest(content))
        except CorruptStoreError:
            now = read()
            if now == content:
                raise
            content = now


_NUMBER = (int, float)
_NEIGHBORS_SHAPE: JsonObject = {
    "noise_floor": _NUMBER,
    "meets_target": bool,
    "audit": {"k": int, "num_rows": int, "recall": _NUMBER, "recall_lower": _NUMBER, "tv": _NUMBER},
    "rerank": {
        "k": int,
        "residual_floor": _NUMBER,
        "off_basis_rows": int,
        "reranked_rows": int,
        "uncertain_rows": int,
    },
    "refinement": {  # in place of "rerank" in stores of embstore before decision 0042
        "k": int,
        "off_basis_rows": int,
        "certified_share": _NUMBER,
        "straddling_pairs": int,
        "read_pairs": int,
        "uncertain_rows": int,
        "residual_floor": _NUMBER,
    },
}
_METADATA_SHAPE: JsonObject = {
    "ess": _NUMBER,
    "ess_share": _NUMBER,
    "max_over_mean": _NUMBER,
    "weighting": {"weighting": str, "k": int, "gamma": _NUMBER},
    "vector_groups": {"groups": int, "rows": int},
    "byte_identity_voided": bool,
    "warnings": list,
    "neighbors": _NEIGHBORS_SHAPE,
}
_MAY_BE_NULL = frozenset({"audit"})  # too few distinct vectors to have neighbours
_MAY_BE_ABSENT = frozenset({"noise_floor", "rerank", "refinement"})  # the first stores of version 1 lack them


def decode_metadata(content: bytes, *, name: str) -> JsonObject:
    """Metadata of weights; the fields that readers show are present and of the right type, others are not checked."""
    value = parse_document(content, name=name)
    _check_shape(value, _METADATA_SHAPE, name)
    if not all(isinstance(warning, str) for warning in value["warnings"]):
        raise CorruptStoreError(f"{name}.warnings: unexpected {shown(value['warnings'])}", hint="run embstore verify STORE")
    return value


def decode_neighbors_spec(content: bytes, *, name: str) -> JsonObject:
    """How a neighbour graph was found; becomes part of the metadata of weights."""
    value = parse_document(content, name=name)
    _check_shape(value, _NEIGHBORS_SHAPE, name)
    return value


def _check_shape(value: object, shape: Mapping[str, Any], name: str) -> None:
    if not isinstance(value, dict):
        raise CorruptStoreError(f"{name}: expected an object, found {shown(value)}", hint="run embstore verify STORE")
    for field, expected in shape.items():
        item = value.get(field)
        if field not in value and field in _MAY_BE_ABSENT:
            continue
        if field in value and item is None and field in _MAY_BE_NULL:
            continue
        if isinstance(expected, dict):
            _check_shape(item, expected, f"{name}.{field}")
        elif not isinstance(item, expected) or (isinstance(item, bool) and expected is not bool):
            raise CorruptStoreError(f"{name}.{field}: unexpected {shown(item)}", hint="run embstore verify STORE")
        elif type(item) is int and abs(item) >= 1 << 63:
            raise CorruptStoreError(f"{name}.{field}: {shown(item)} is too large", hint="run embstore verify STORE")


def weights_problem(weights_N: NDArray[np.float32]) -> str | None:
    """Why an array cannot be weights, or None; makes no copy."""
    with np.errstate(invalid="ignore"):
        return range_problem(float(weights_N.min()), float(weights_N.max()), float(weights_N.sum(dtype=np.float64)))


def range_problem(low: float, high: float, total: float) -> str | None:
    """Why values of this range and sum cannot be weights, or None."""
    if low >= 0 and np.isfinite(high) and abs(total - 1) <= WEIGHTS_TOLERANCE:  # NaN is never >= 0
        return None
    return f"has values from {low} to {high} with sum {total}, expected finite values >= 0 with sum 1"
