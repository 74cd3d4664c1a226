"""Finished stores of many rows in seconds: rows and neighbours are random numbers, everything else is a real build's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import K_MAX, BuildConfig, DensityConfig, EmbeddingConfig
from embstore.core.density import NOISE_FLOOR
from embstore.core.interfaces import PromptReader, RowBlock
from embstore.core.prompts import Prompt
from embstore.core.spec import EmbeddingSpec
from embstore.flow.build import build
from embstore.search.graph import KnnGraph
from tests.support.fake import FakeEmbedder, FakeSource

CONFIG = BuildConfig(
    embedding=EmbeddingConfig(model="fake", chunk_rows=2048, window_rows=8192), density=DensityConfig(knn="exact")
)


class _Source(FakeSource):
    def __init__(self) -> None:
        super().__init__(dimension=8, rank=2, window_rows=8192)

    def create(self, prompts: PromptReader, config: EmbeddingConfig, **options: Any) -> FakeEmbedder:
        made = super().create(prompts, config, **options)
        return _Embedder(self, made.spec, made.basis_VR)

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], **options: Any) -> FakeEmbedder:
        return _Embedder(self, spec, basis_VR)


class _Embedder(FakeEmbedder):
    def _block(self, prompts: Sequence[Prompt], first_row: int) -> RowBlock:
        angle_B = np.random.default_rng(first_row).uniform(0, 2 * np.pi, len(prompts))
        coord_BR = np.stack([np.cos(angle_B), np.sin(angle_B)], axis=1).astype(np.float32)
        exact_BV = coord_BR.astype(np.float64) @ self.basis_VR.T.astype(np.float64)
        emb_BV = exact_BV.astype(np.float16)
        return RowBlock(
            emb_BV=emb_BV,
            coord_BR=coord_BR,
            residual_B=np.linalg.norm(emb_BV - exact_BV, axis=1).astype(np.float32),
            sequence_B=np.arange(first_row + 1, first_row + len(prompts) + 1, dtype=np.uint64),
            failed=(),
        )


def _graph(near_share: float) -> Callable[..., KnnGraph]:
    """A graph of random neighbours; of ``near_share`` of the rows all of them are near-duplicates."""

    def build_graph(
        coord_NR: NDArray[np.float32], failed_N: NDArray[np.bool_], config: DensityConfig, **_: object
    ) -> KnnGraph:
        random = np.random.default_rng(7)
        num_rows = len(coord_NR)
        row_N = np.arange(num_rows, dtype=np.int32)
        ids_NK = ((row_N[:, None] + random.integers(1, num_rows, (num_rows, K_MAX))) % num_rows).astype(np.int32)
        distances_NK = np.sort(random.uniform(0.5, 1.5, (num_rows, K_MAX)).astype(np.float32), axis=1)
        distances_NK[: int(near_share * num_rows)] *= 1e-3
        return KnnGraph(
            config=config,
            ids_NK=ids_NK,
            distances_NK=distances_NK,
            groups_N=row_N,
            num_nodes=num_rows,
            noise_floor=NOISE_FLOOR,
            method="exact",
            pilot_recall=None,
            shards=0,
            effort=None,
            audit=None,
            meets_target=True,
            repaired_nodes=0,
        )

    return build_graph


def large_store(folder: Path, lines: Sequence[dict[str, Any]], *, near_share: float = 0.0) -> Path:
    """A finished store of these lines in ``folder``."""
    prompts = folder.parent / f"{folder.name}.jsonl"
    with prompts.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    with mock.patch("embstore.search.graph.build_graph", _graph(near_share)):
        build(prompts, out=folder, config=CONFIG, source=_Source())
    return folder


def unlike_lines(num_rows: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Lines with four fields that differ on every line, and one that tells their source."""
    return [
        {
            "prompt": f"Question number {row}: what is {row} times {seed + 2}?",
            "src": "abc"[row % 3],
            "answer": f"The answer to question {row} is {row * (seed + 2)}.",
            "url": f"https://example.org/{seed}/questions/{row:08d}",
            "uuid": f"{row:032x}",
            "solution": f"{row} times {seed + 2} is computed step by step, {row} of them.",
        }
        for row in range(num_rows)
    ]
