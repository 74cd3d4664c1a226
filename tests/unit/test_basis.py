"""Coordinate maps and bases of samples, against numpy's singular values in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embstore.core.errors import BudgetError
from embstore.model import basis, range_finder
from embstore.model.basis import coordinate_map, factor_bytes, largest_width, orthonormal_basis
from embstore.model.heads import AffineHead
from embstore.model.pilot import find_basis
from embstore.model.range_finder import sampled_basis


def reader(matrix: NDArray[np.float64]) -> basis.ReadBlock:
    return lambda start, stop: torch.from_numpy(matrix[start:stop])


def spanning(columns: int, strengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """A [columns, len(strengths)] matrix with these singular values."""
    random = np.random.default_rng(0)
    width = len(strengths)
    left, right = (np.linalg.qr(random.standard_normal((size, width)))[0] for size in (columns, width))
    return left * strengths @ right.T


def test_a_map_has_the_singular_values_and_vectors_strongest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "_STRIP_COLUMNS", 7)  # the last strip is narrower
    matrix = spanning(900, np.geomspace(5, 0.01, 20))
    map_MR = coordinate_map(reader(matrix), 900, 20, scale=0.5).astype(np.float64)
    _, strengths, right = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(np.linalg.norm(map_MR, axis=0), 0.5 * strengths, rtol=1e-6)
    np.testing.assert_allclose(np.abs((map_MR / np.linalg.norm(map_MR, axis=0) * right.T).sum(axis=0)), 1, atol=1e-6)


def test_weak_directions_of_a_head_are_no_noise() -> None:
    """A million times weaker in energy than the strongest, as in trained heads: a float32 Gram matrix loses them."""
    matrix = spanning(30_000, np.geomspace(1, 1e-5, 64))
    map_MR = coordinate_map(reader(matrix.astype(np.float32)), 30_000, 64).astype(np.float64)
    states = np.random.default_rng(1).standard_normal((30, 64))
    weak = np.linalg.svd(matrix.astype(np.float32).astype(np.float64), full_matrices=False)[2][-1]
    exact = np.linalg.norm(matrix.astype(np.float32).astype(np.float64) @ weak)
    assert np.linalg.norm(weak @ map_MR) == pytest.approx(exact, rel=1e-3)
    rows = states @ matrix.astype(np.float32).astype(np.float64).T
    np.testing.assert_allclose(np.linalg.norm(states @ map_MR, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-6)


def test_directions_that_the_head_does_not_have_are_left_out() -> None:
    matrix = spanning(200, np.array([3.0, 2.0, 1.0, 1e-9, 0.0]))
    assert coordinate_map(reader(matrix), 200, 5).shape == (5, 3)
    assert coordinate_map(reader(matrix[:2]), 2, 5).shape == (5, 2)  # fewer columns than states have


def test_a_basis_is_orthonormal_and_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "_STRIP_COLUMNS", 16)
    matrix = spanning(3000, np.geomspace(1, 1e-4, 50))
    basis_VR = orthonormal_basis(reader(matrix), 3000, 50, max_rank=50).astype(np.float64)
    assert np.abs(basis_VR.T @ basis_VR - np.eye(50)).max() <= 1e-6
    assert np.linalg.norm(matrix - basis_VR @ (basis_VR.T @ matrix)) <= 1e-6


def test_a_factorisation_that_the_budget_does_not_allow_is_refused_with_what_it_needs() -> None:
    head = AffineHead(weight_VD=torch.empty((10, 3000), device="meta"), bias_V=None, scale=1.0)
    parts: Any = SimpleNamespace(head=head, device=torch.device("cpu"))
    settings: Any = SimpleNamespace(spec=SimpleNamespace(dimension=10))
    with pytest.raises(BudgetError, match="coordinates of 3000 inputs need 387") as caught:
        find_basis(parts, settings, memory_bytes=200 << 20)
    least = int(str(caught.value.hint).split()[2].removesuffix("MiB")) << 20
    assert factor_bytes(3000) <= least < factor_bytes(3000) + (1 << 20)


@pytest.mark.parametrize("memory_bytes", [24 << 20, 200 << 20, 2 << 30, 20 << 30])
def test_the_largest_width_fits_and_is_not_much_too_small(memory_bytes: int) -> None:
    width = largest_width(memory_bytes)
    assert factor_bytes(width) <= memory_bytes < factor_bytes(width * 9 // 8)


def sample_of(rows: NDArray[np.float64], seen: list[int]) -> range_finder.ReadSample:
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def read(width: int) -> list[NDArray[np.float32]]:
        start = seen[-1] if seen else 0
        seen.append(width)
        return [unit[:start], unit[start:width]]

    return read


@pytest.mark.parametrize(
    ("directions", "max_rank", "widths"),
    [
        (5, 40, [16]),  # they are all there at once
        (12, 40, [16, 32]),  # more than half of the first sample
        (60, 40, [16, 32, 64, 128, 160]),  # more than the basis may have: four rows a direction
        (80, 80, [16, 32, 64, 128, 160]),  # all columns: half of the sample suffices
    ],
)
def test_a_sample_grows_until_it_loses_no_more_than_float16_does(
    directions: int, max_rank: int, widths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_finder, "_FIRST_SAMPLE", 16)
    random = np.random.default_rng(0)
    rows = random.standard_normal((400, directions)) @ random.standard_normal((directions, 80))
    seen: list[int] = []
    basis_VR = sampled_basis(
        sample_of(rows, seen), 80, limit=160, max_rank=max_rank, tail=1e-4, work=tmp_path, device=torch.device("cpu")
    )
    assert seen == widths
    assert basis_VR.shape == (80, min(directions, max_rank))
    if directions <= max_rank:  # rows that were not sampled are in it
        assert np.abs(rows - rows @ basis_VR @ basis_VR.T).max() <= 1e-4
