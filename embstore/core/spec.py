"""What a store is: the spec, ``spec.json``, and the array metadata that follows from it. Pure, as ``core.format`` is.

It is a separate module because training follows the manifest and does not need to know how rows were made.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from embstore.core.config import Compressor
from embstore.core.decode import from_json
from embstore.core.errors import CorruptStoreError, FieldMismatch
from embstore.core.format import (
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_COLUMNS,
    MAX_ROWS,
    MAX_WINDOWS,
    SPEC,
    JsonObject,
    document,
    parse_document,
)


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
    code_sha256: str = ""  # of trusted code in the folder; stores from before December 2026 have none


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """How hidden states become rows.

    ``kind`` is one of

    - "affine": states are pooled first, then ``scale * (W h + b)`` is computed once a prompt;
    - "capped": the logits of every token, one block of columns at a time, with a soft cap;
    - "streamed": the logits of every token, by the code of the model's class;
    - "none": the pooled states are the rows (space "hidden");
    - "imported": an array's rows; fields that concern tokens are 0 or "none".

    Stores from before December 2026 may have "network": pooled behind a network that lies before the output layer.
    ``scale`` is the factor that a class applies after an affine head, 1.0 for any other kind.
    """

    kind: str
    scale: float = 1.0

    @property
    def pools_logits(self) -> bool:
        """Whether the means are of logits, V wide, because the head is not affine."""
        return self.kind in ("capped", "streamed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Versions:
    """Versions of the libraries that decide the bits of rows; None where one has no part in them (an imported array)."""

    embstore: str
    torch: str
    transformers: str | None = None
    tokenizers: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingSpec:
    """Everything about the embedding pass that changes a byte, resolved.

    ``dimension`` is V (D in space "hidden"), ``rank`` is R. ``space`` and ``pooling`` are the options of those names, "none"
    for an imported array. ``capability`` is what decides a kernel's bits: a CPU's vector instructions or a GPU's model;
    ``packed_layers`` and ``packed_head`` say whether the weights of the backbone's linear layers, and of the output layer,
    lie in oneDNN's layout (docs/decisions/0025). ``max_tokens`` is never above ``token_limit``, the most that the model
    takes (None: no limit is known). ``chat_date`` (YYYY-MM-DD) is what chat templates print as today. ``versions`` and
    ``chat_date`` are None in a store from before they were recorded; an imported array has no date.

    ``basis`` says where coordinates come from, and ``format.basis_file`` which file has it: "gram" (a map of an affine
    head's inputs), or an orthonormal basis: "range-finder" (of a sample of rows), "identity" (hidden states), "head" (an
    affine head's span, in stores from before December 2026).
    """

    dimension: int
    rank: int
    columns: str
    head: Head
    space: str
    pooling: str
    normalization: str
    token_rule: str
    max_tokens: int
    batch_tokens: int
    dtype: str
    device: str
    capability: str
    packed_layers: bool = False
    packed_head: bool = False
    threads: int
    basis: str
    token_limit: int | None = None
    versions: Versions | None = None
    chat_date: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSpec:
    """``spec.json``: the identity of a store, written once, before row 0.

    ``basis_sha256`` is the digest of the file that ``format.basis_file`` names. ``sequences`` says whether there is a
    ``sequences.npy``, which stores from before December 2026 lack.
    """

    format_version: int
    rows: int
    prompts_fingerprint: str
    model: ModelIdentity
    embedding: EmbeddingSpec
    window_rows: int
    chunk_rows: int
    compressor: Compressor
    basis_sha256: str
    sequences: bool = True


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


def decode_spec(content: bytes) -> StoreSpec:
    """Read ``spec.json``; sizes that no store can have are a CorruptStoreError."""
    spec = from_json(StoreSpec, _upgraded(parse_document(content, name=SPEC)), name=SPEC)
    problem = spec_problem(spec)
    if problem is not None:
        raise CorruptStoreError(f"{SPEC}: {problem}", hint="run embstore verify STORE")
    return spec


# The spelling until November 2026: sentences instead of fields. A stored spec.json is never rewritten.
_OLD_POOLING = {
    "mean of logits over own tokens": ("logits", "mean"),
    "logits of the last own token": ("logits", "last"),
    "mean of hidden states over own tokens": ("hidden", "mean"),
    "hidden state of the last own token": ("hidden", "last"),
    "none: rows are given": ("none", "none"),
}
_OLD_PACKED_LAYERS, _OLD_PACKED_HEAD = " with packed layers", " and head"


def _upgraded(whole: JsonObject) -> JsonObject:
    """``spec.json`` with today's fields, where it has "head_scale" and sentences, or lacks what later releases added."""
    whole = {"sequences": False, **whole}
    model = whole.get("model")
    if isinstance(model, dict) and "code_sha256" not in model:
        whole = {**whole, "model": {**model, "code_sha256": ""}}
    old = whole.get("embedding")
    if not isinstance(old, dict):
        return whole
    if not old.keys() & {"token_limit", "versions"}:
        old = {**old, "token_limit": None, "versions": None}
    old = {"chat_date": None, **old}
    if "head_scale" not in old:
        return {**whole, "embedding": old}
    new = {name: value for name, value in old.items() if name != "head_scale"}
    new["head"] = {"kind": old.get("head"), "scale": old["head_scale"]}
    pooling, capability = old.get("pooling"), old.get("capability")
    if isinstance(pooling, str):
        new["space"], new["pooling"] = _OLD_POOLING.get(pooling, ("logits", pooling))
    if isinstance(capability, str):
        instructions = capability.removesuffix(_OLD_PACKED_HEAD)
        new["capability"] = instructions.removesuffix(_OLD_PACKED_LAYERS)
        new["packed_layers"] = instructions.endswith(_OLD_PACKED_LAYERS)
        new["packed_head"] = capability.endswith(_OLD_PACKED_LAYERS + _OLD_PACKED_HEAD)
    return {**whole, "embedding": new}


def spec_problem(spec: StoreSpec) -> str | None:  # noqa: PLR0911 - one return per limit
    """Which limit of the format a spec breaks, or None."""
    dimension, rank = spec.embedding.dimension, spec.embedding.rank
    if not 0 < spec.rows <= MAX_ROWS:
        return f"{spec.rows} rows, a store has 1 to {MAX_ROWS}"
    if not (0 < dimension <= MAX_COLUMNS and 0 < rank <= MAX_COLUMNS):
        return f"rows of {dimension} columns and {rank} coordinates, a row has 1 to {MAX_COLUMNS}"
    if spec.chunk_rows < 1 or 2 * spec.chunk_rows * dimension > MAX_CHUNK_BYTES:
        return f"chunks of {spec.chunk_rows} rows x {dimension} columns, a chunk has at most {MAX_CHUNK_BYTES} bytes"
    if spec.window_rows < 1 or spec.window_rows % spec.chunk_rows:
        return f"windows of {spec.window_rows} rows, not a multiple of the {spec.chunk_rows} rows of a chunk"
    if 4 * min(spec.window_rows, spec.rows) * rank > MAX_CHUNK_BYTES:
        return f"windows of {spec.window_rows} rows x {rank} coordinates, which take more than {MAX_CHUNK_BYTES} bytes"
    if -(-spec.rows // spec.window_rows) > MAX_WINDOWS or -(-spec.rows // spec.chunk_rows) > MAX_CHUNKS:
        return (
            f"{spec.rows} rows in windows of {spec.window_rows} and chunks of {spec.chunk_rows}, "
            f"a store has at most {MAX_WINDOWS} windows and {MAX_CHUNKS} chunks"
        )
    return None


_COLUMN_NAMES = {"hidden": "hidden", "imported": "column"}


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
            "dimension_names": ["row", _COLUMN_NAMES.get(spec.embedding.columns, "vocabulary")],
        }
    )
