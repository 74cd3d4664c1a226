"""Small valid records of the on-disk format, for tests that need one and care for a field or two."""

from __future__ import annotations

import dataclasses
from typing import Any

from embstore.core.format import FileDigest, Manifest
from embstore.core.records import ChunkRecord, PromptsRecord, SpecRecord, WindowRecord
from embstore.core.spec import EmbeddingSpec, Head, ModelIdentity, StoreSpec

DIGEST = FileDigest(bytes=3, sha256="ab" * 32)
MODEL = ModelIdentity(
    name="tiny",
    architecture="Tiny",
    revision=None,
    weights_sha256="1" * 64,
    config_sha256="2" * 64,
    tokenizer_sha256="3" * 64,
    trust_remote_code=False,
)
EMBEDDING = EmbeddingSpec(
    dimension=64,
    rank=12,
    columns="model",
    head=Head(kind="affine"),
    space="logits",
    pooling="mean",
    normalization="l2",
    token_rule="default",
    max_tokens=512,
    batch_tokens=4096,
    dtype="float32",
    device="cpu",
    capability="AVX2",
    threads=2,
    basis="head",
)
PROMPTS = PromptsRecord(rows=70, lines=73, quarantined=1, repeats=2, fingerprint="f" * 64, files={"prompts.jsonl": DIGEST})
SPEC = SpecRecord(files={"spec.json": DIGEST})


def spec(**changes: Any) -> StoreSpec:
    """A spec of 70 rows."""
    whole = StoreSpec(
        format_version=1,
        rows=70,
        prompts_fingerprint="f" * 64,
        model=MODEL,
        embedding=EMBEDDING,
        window_rows=32,
        chunk_rows=16,
        compressor="lz4",
        basis_sha256="b" * 64,
    )
    return dataclasses.replace(whole, **changes)


def window_record(window: int, start: int, stop: int, **changes: Any) -> WindowRecord:
    """The commit of one window."""
    record = WindowRecord(
        window=window,
        start=start,
        stop=stop,
        chunks=[ChunkRecord(index=window, bytes=10, crc32c="00000000")],
        coordinates_crc32c="00000001",
        residuals_crc32c="00000002",
        sequences_crc32c="00000003",
        tokens=99,
        truncated=0,
        splits=0,
        failed=[],
    )
    return dataclasses.replace(record, **changes)


def manifest(files: dict[str, FileDigest], **changes: Any) -> Manifest:
    """A manifest over ``files``."""
    whole = Manifest(
        format_version=1,
        rows=70,
        dimension=64,
        neighbors="2222222222222222",
        names={"default": "1111111111111111"},
        files=files,
    )
    return dataclasses.replace(whole, **changes)
