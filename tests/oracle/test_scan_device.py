"""The exact engine on a GPU, as far as a machine without one can tell: its plan, and the settings of torch that it needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embstore.core.errors import BudgetError
from embstore.host.numerics import full_precision
from embstore.search.exact import scan
from embstore.search.exact.scan import all_neighbors, plan_on_device, plan_scan
from embstore.search.exact.tiles import operand_bytes

CPU = torch.device("cpu")
REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


def settings() -> list[object]:
    matmul = torch.backends.cuda.matmul
    names = [*REDUCTIONS, *(f"{name}_split_k" for name in REDUCTIONS)]
    return [*(getattr(matmul, name, None) for name in names), torch.get_float32_matmul_precision()]


@pytest.fixture
def reduced_precision() -> object:
    """A process that allows what many training scripts allow."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def points(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((count, 24)).astype(np.float32)


def test_products_are_added_in_float32_while_a_scan_goes_on(reduced_precision: object, tmp_path: Path) -> None:
    before = settings()
    assert before[:2] == [True, True]
    blocks = all_neighbors(points(1500), 5, threads=1, memory_bytes=1 << 20, work=tmp_path)
    next(blocks)
    assert torch.is_grad_enabled()  # whoever takes the blocks may train meanwhile
    assert settings()[:2] == [False, False]
    assert settings()[-1] == "highest"
    assert len(list(blocks)) > 0
    assert settings() == before
    abandoned = all_neighbors(points(1500), 5, threads=1, memory_bytes=1 << 20, work=tmp_path)
    next(abandoned)
    abandoned.close()
    assert settings() == before


def test_settings_are_put_back_after_an_error(reduced_precision: object) -> None:
    before = settings()
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_all_nodes_lie_on_the_device_where_they_fit_beside_the_tiles(
    has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "has_fast_bfloat16", lambda device: has_bfloat16)
    nodes, rank, budget = 10_000_000, 4097, 2 << 30
    needed = operand_bytes(nodes, rank, scan.scan_dtype(CPU))
    assert needed > 80 * 10**9
    for free_bytes, is_held in ((141 << 30, needed < 139 << 30), (24 << 30, False)):
        plan, found = plan_on_device(nodes, nodes, rank, 32, memory_bytes=budget, free_bytes=free_bytes, device=CPU)
        assert found == is_held
        assert plan.memory_bytes <= min(budget, free_bytes)
    operand = operand_bytes(100_000, rank, scan.scan_dtype(CPU))
    for free_bytes, is_held in ((2 * operand, True), (operand + (64 << 20), False)):
        plan, found = plan_on_device(100_000, 100_000, rank, 32, memory_bytes=8 << 30, free_bytes=free_bytes, device=CPU)
        assert found == is_held
        assert plan.memory_bytes + found * operand < free_bytes


def test_a_device_without_room_for_a_tile_is_refused_with_what_it_takes() -> None:
    least = plan_scan(10_000, 256, 32, threads=1, memory_bytes=0).memory_bytes + (256 << 20)
    with pytest.raises(
        BudgetError, match=rf"the exact search needs {least / 2**20:.1f} MiB on cpu, which has 64\.0 MiB free"
    ):
        plan_on_device(10_000, 10_000, 256, 32, memory_bytes=2 << 30, free_bytes=64 << 20, device=CPU)
    assert plan_on_device(10_000, 10_000, 256, 32, memory_bytes=2 << 30, free_bytes=least, device=CPU)[1] is False


@pytest.mark.parametrize("fits", [True, False])
def test_where_the_nodes_lie_changes_nothing(fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coord_GR = points(1500)
    expected = list(all_neighbors(coord_GR, 7, threads=1, memory_bytes=64 << 20, work=tmp_path))
    (tmp_path / "quantised.npy").unlink()
    monkeypatch.setattr(scan, "free_device_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(scan, "operand_bytes", lambda *_: 1 << (20 if fits else 40))
    found = list(all_neighbors(coord_GR, 7, threads=1, memory_bytes=64 << 20, work=tmp_path))
    assert (tmp_path / "quantised.npy").exists() != fits
    for name in ("nodes_N", "ids_NK", "distances_NK"):
        first, second = (np.concatenate([getattr(block, name) for block in blocks]) for blocks in (expected, found))
        np.testing.assert_array_equal(first, second)
