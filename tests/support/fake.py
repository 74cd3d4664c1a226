"""A fake embedder: the hash of a prompt decides its row. Imports no torch, so a build takes milliseconds.

Rows lie in an R-dimensional subspace, as logits of an affine head do: coordinates are hashed, the row is their image. A
prompt whose text holds "FAIL" has no usable row; with a chat template, neither has a chat with "REFUSE". ``calls`` records
every window that was computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import DEFAULT_CHAT_DATE, EmbeddingConfig
from embstore.core.events import Observer, ignore
from embstore.core.interfaces import Check, PromptReader, RowBlock, WindowCounts
from embstore.core.prompts import Prompt
from embstore.core.records import FailedRow, refused_by_template
from embstore.core.spec import EmbeddingSpec, Head, ModelIdentity, Versions

DIMENSION = 64
RANK = 12
VERSIONS = Versions(embstore="1", torch="2+fake", transformers="3", tokenizers="4")


class FakeSource:
    """An EmbedderSource whose identity and hardware tests may change."""

    def __init__(self, *, dimension: int = DIMENSION, rank: int = RANK, window_rows: int = 32) -> None:
        self.dimension = dimension
        self.rank = rank
        self.window_rows = window_rows
        self.token_limit: int | None = 2048
        self.model = ModelIdentity(
            name="fake",
            architecture="Fake",
            revision=None,
            weights_sha256="w" * 64,
            config_sha256="c" * 64,
            tokenizer_sha256="t" * 64,
            trust_remote_code=False,
        )
        self.prints_date, self.records_date = False, True
        self.versions: Versions | None = VERSIONS
        self.devices: list[str | None] = []  # where it was created or reopened
        self.calls: list[tuple[int, int]] = []  # rows start, stop of every window computed
        self.has_template = False
        self.templates = 0  # how often it was asked for
        self.creations = 0
        self.reopenings = 0

    def identity(self, observer: Observer = ignore) -> ModelIdentity:
        return self.model

    def template(self, chat_date: str | None) -> FakeTemplate | None:
        self.templates += 1
        return FakeTemplate() if self.has_template else None

    def device(self, name: str) -> str:
        return {"auto": "cpu", "cuda": "cuda:0"}.get(name, name)

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        device = self.device(config.device or "cpu").partition(":")[0]
        return {"device": device, "capability": "FAKE", "threads": config.threads or 1, "versions": self.versions}

    def reads_clock(self) -> bool:
        return self.prints_date

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path | None, observer: Observer
    ) -> FakeEmbedder:
        self.creations += 1
        self.devices.append(config.device)
        spec = EmbeddingSpec(
            dimension=self.dimension,
            rank=self.rank,
            columns=config.vocab or "model",
            head=Head(kind="affine"),
            space="logits",
            pooling="mean",
            normalization="l2",
            token_rule="characters",
            max_tokens=min(config.max_tokens or 512, self.token_limit or 1 << 20),
            batch_tokens=config.batch_tokens or 4096,
            dtype=config.dtype if config.dtype not in (None, "auto") else "float32",
            device=self.device(config.device or "cpu").partition(":")[0],
            capability="FAKE",
            threads=config.threads or 1,
            basis="head",
            token_limit=self.token_limit,
            versions=self.versions,
            chat_date=(config.chat_date or DEFAULT_CHAT_DATE) if self.records_date else None,
        )
        random = np.random.default_rng(0)
        basis_VR = np.linalg.qr(random.standard_normal((self.dimension, self.rank)))[0].astype(np.float32)
        return FakeEmbedder(self, spec, basis_VR)

    def take_over(
        self,
        prompts: PromptReader,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        *,
        memory_bytes: int,
        device: str | None = None,
        observer: Observer = ignore,
    ) -> FakeEmbedder:
        return self.reopen(spec, basis_VR, device=device, observer=observer)

    def reopen(
        self,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        *,
        memory_bytes: int = 0,
        device: str | None = None,
        observer: Observer = ignore,
    ) -> FakeEmbedder:
        self.reopenings += 1
        self.devices.append(device)
        return FakeEmbedder(self, spec, basis_VR)


class FakeTemplate:
    """Refuses chats whose text holds REFUSE."""

    digest = "f" * 64

    def refusal(self, prompt: Prompt) -> str | None:
        return refused_by_template("the text says so") if "REFUSE" in prompt.rendered else None


class FakeEmbedder:
    """Deterministic rows from hashes."""

    truncated_share = 0.0
    seconds_per_row = 1e-6

    def __init__(self, source: FakeSource, spec: EmbeddingSpec, basis_VR: NDArray[np.float32]) -> None:
        self._source = source
        self.spec = spec
        self.basis_VR = basis_VR
        self.max_window_rows = source.window_rows
        self.counts = WindowCounts(tokens=0, truncated=0, splits=0)

    def memory_bytes(self, chunk_rows: int) -> int:
        return 1 << 20

    def close(self) -> None:
        pass

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        first_row: int,
        chunk_rows: int,
        check: Check,
        following: Iterable[Sequence[Prompt]] = (),
    ) -> Iterator[RowBlock]:
        self._source.calls.append((first_row, first_row + len(prompts)))
        for start in range(0, len(prompts), chunk_rows):
            check()
            yield self._block(prompts[start : start + chunk_rows], first_row + start)
        tokens = sum(len(prompt.rendered) for prompt in prompts)
        self.counts = WindowCounts(tokens=tokens, truncated=0, splits=0)

    def _block(self, prompts: Sequence[Prompt], first_row: int) -> RowBlock:
        coord_BR = np.stack([self._coordinates(prompt) for prompt in prompts])
        # float64, because float32 products may depend on how many rows are multiplied, and rows must not
        exact_BV = coord_BR.astype(np.float64) @ self.basis_VR.T.astype(np.float64)
        emb_BV = exact_BV.astype(np.float16)
        residual_B = np.linalg.norm(emb_BV - exact_BV, axis=1).astype(np.float32)
        sequence_B = np.array([self._seed(prompt) for prompt in prompts], dtype=np.uint64)
        failed = []
        for position, prompt in enumerate(prompts):
            refusal = FakeTemplate().refusal(prompt) if self._source.has_template and prompt.messages is not None else None
            if "FAIL" in prompt.rendered or refusal is not None:
                emb_BV[position] = coord_BR[position] = residual_B[position] = np.nan
                failed.append(FailedRow(row=first_row + position, reason=refusal or "the text says so"))
        return RowBlock(emb_BV=emb_BV, coord_BR=coord_BR, residual_B=residual_B, sequence_B=sequence_B, failed=tuple(failed))

    def _seed(self, prompt: Prompt) -> int:
        # "same:" texts share one vector, as prompts do that are alike up to max_tokens
        text = "same" if prompt.rendered.startswith("same:") else prompt.rendered
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def _coordinates(self, prompt: Prompt) -> NDArray[np.float32]:
        vector = np.random.default_rng(self._seed(prompt)).standard_normal(self.spec.rank)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


def renamed(source: FakeSource, **changes: Any) -> FakeSource:
    """The same source with another model identity."""
    other = FakeSource(dimension=source.dimension, rank=source.rank, window_rows=source.window_rows)
    other.model = dataclasses.replace(source.model, **changes)
    return other
