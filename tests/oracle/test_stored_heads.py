"""Output layers stay in the dtype in which they are stored, and are never copied whole; products are those of float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from embstore.host.memory import read_memory
from embstore.model import heads
from embstore.model.backbone import SplitModel
from embstore.model.basis import coordinate_map, orthonormal_basis
from embstore.model.finish import finish, make_finisher, spanning_columns
from embstore.model.heads import AffineHead, CappedHead, add_capped, add_streamed
from tests.support.models import (
    make_model,
    make_prompts,
    make_tokenizer,
    open_embedder,
    reopened,
    rows_before_rounding,
    save_model,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COLUMNS, WIDTH = 5000, 24  # three blocks of columns


def head_of(dtype: torch.dtype, *, bias: bool, scale: float = 0.5, columns: int = COLUMNS) -> AffineHead:
    random = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(columns, WIDTH, generator=random).to(dtype)
    bias_V = torch.randn(columns, generator=random) if bias else None
    return AffineHead(weight_VD=weight_VD, bias_V=bias_V, scale=scale)


def exact_logits(head: AffineHead, hidden_LD: torch.Tensor) -> torch.Tensor:
    bias_V = 0 if head.bias_V is None else head.bias_V.double()
    return head.scale * (hidden_LD.double() @ head.weight_VD.double().T + bias_V)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("resident_bytes", [0, 1 << 30])
def test_rows_and_coordinates_are_those_of_float64(
    dtype: torch.dtype, bias: bool, resident_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_RESIDENT_BYTES", resident_bytes)
    head, mean_BD = head_of(dtype, bias=bias), torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    read_block, width = spanning_columns(head, COLUMNS)
    map_MR = coordinate_map(read_block, COLUMNS, width, scale=head.scale)
    finisher = make_finisher(_spec(COLUMNS), head, map_MR, torch.device("cpu"))
    emb_BV, coord_BR, residual_B = torch.empty(7, COLUMNS, dtype=torch.float16), torch.empty(7, width), torch.empty(7)
    finish(finisher, mean_BD, emb_BV, coord_BR, residual_B)
    exact_BV = torch.nn.functional.normalize(exact_logits(head, mean_BD), dim=1)
    coordinates, norm_B = finisher.coordinates(mean_BD)
    unit_BV = torch.cat([unit_BC.clone() for _, unit_BC in finisher.unit_blocks(mean_BD, norm_B)], dim=1)
    assert (unit_BV.double() - exact_BV).norm(dim=1).max() <= 1e-6
    assert torch.equal(coordinates, coord_BR)
    lost_B = (emb_BV.double() - exact_BV).norm(dim=1)
    torch.testing.assert_close(residual_B.double(), lost_B, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        torch.cdist(coord_BR.double(), coord_BR.double()), torch.cdist(exact_BV, exact_BV), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_capped_means_are_those_of_float64(dtype: torch.dtype, bias: bool) -> None:
    head = head_of(dtype, bias=bias)
    capped = CappedHead(linear=head, cap=3.0)
    random = torch.Generator().manual_seed(1)
    hidden_BTD = torch.randn(5, 90, WIDTH, generator=random)
    exact_LV = exact_logits(head, hidden_BTD[0])
    torch.testing.assert_close(head(hidden_BTD[0]).double(), exact_LV, atol=1e-4, rtol=0)
    torch.testing.assert_close(capped(hidden_BTD[0]).double(), 3 * torch.tanh(exact_LV / 3), atol=1e-5, rtol=0)
    pooled_BT = np.random.default_rng(0).random((5, 90)) < 0.7
    mean_WV = torch.full((6, COLUMNS), 7.0)
    rows_B = torch.tensor([4, 0, 5, 1, 2])
    assert add_capped(capped, hidden_BTD, pooled_BT, rows_B, mean_WV, columns=COLUMNS)
    for local, row in enumerate(rows_B.tolist()):
        exact_V = (3 * torch.tanh(exact_logits(head, hidden_BTD[local, pooled_BT[local]]) / 3)).mean(0)
        torch.testing.assert_close(mean_WV[row].double(), exact_V, atol=1e-6, rtol=0)
    assert torch.equal(mean_WV[3], torch.full((COLUMNS,), 7.0))


class HostReads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: values and sizes that depend on a tensor's content."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select):
            self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["capped", "streamed"])
def test_a_batch_is_read_back_once(kind: str) -> None:
    """As many blocks of columns and parts of tokens as there are: each read would stop a GPU's queue."""
    head = head_of(torch.float32, bias=True)
    hidden_BTD, pooled_BT = torch.randn(9, 130, WIDTH), np.ones((9, 130), dtype=np.bool_)
    assert pooled_BT.sum() > 4 * heads.streamed_tokens(COLUMNS)
    mean_WV, rows_B = torch.zeros(9, COLUMNS), torch.arange(9)
    with HostReads() as reads:
        if kind == "capped":
            assert add_capped(CappedHead(linear=head, cap=3.0), hidden_BTD, pooled_BT, rows_B, mean_WV, columns=COLUMNS)
        else:
            add_streamed(head, hidden_BTD, pooled_BT, rows_B, mean_WV, columns=COLUMNS)
    assert reads.count == 1


def test_a_head_that_is_not_finite_is_said_at_the_end() -> None:
    head = head_of(torch.float32, bias=False)
    head.weight_VD[10] = torch.nan  # in the first block of columns
    mean_WV = torch.zeros(1, COLUMNS)
    pooled_BT = np.ones((1, 3), dtype=np.bool_)
    capped = CappedHead(linear=head, cap=3.0)
    assert not add_capped(capped, torch.randn(1, 3, WIDTH), pooled_BT, torch.arange(1), mean_WV, columns=COLUMNS)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_models_output_layer_is_taken_as_it_lies(name: str) -> None:
    module = make_model(name).to(torch.bfloat16)
    stored = module.get_output_embeddings().weight
    head = SplitModel(module, torch.device("cpu")).output_layer()
    assert head is not None
    assert head.weight_VD.dtype == torch.bfloat16
    assert head.weight_VD.data_ptr() == stored.data_ptr()


def test_a_tied_head_keeps_what_was_loaded_when_the_backbone_is_cast() -> None:
    module = make_model("llama-tied")
    loaded = module.get_output_embeddings().weight.detach().clone()
    model = SplitModel(module, torch.device("cpu"))
    model.settle(torch.bfloat16, None)
    head = model.output_layer()
    assert head is not None
    assert torch.equal(head.weight_VD, loaded)
    assert module.get_input_embeddings().weight.dtype == torch.bfloat16


def test_only_a_small_head_is_packed_in_a_new_store_and_an_old_one_stays_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", make_model("llama"), make_tokenizer())
    prompts = make_prompts(24)
    small = open_embedder(folder, prompts, tmp_path / "small")
    monkeypatch.setattr(heads, "_RESIDENT_BYTES", 1000)
    large = open_embedder(folder, prompts, tmp_path / "large")
    assert not large.spec.packed_head
    assert large.spec.packed_layers == small.spec.packed_layers
    continued = reopened(folder, small)
    assert len(continued._finisher._packed) == len(small._finisher._packed)
    rows = [rows_before_rounding(each, prompts) for each in (small, large, continued)]
    assert np.linalg.norm(rows[1] - rows[0], axis=1).max() <= 2e-6
    assert np.array_equal(rows[2], rows[0])


@pytest.mark.parametrize("name", ["llama", "phi", "granite"])
def test_a_store_with_a_basis_of_the_head_is_continued(name: str, tmp_path: Path) -> None:
    """Stores from before December 2026 have no map."""
    folder = save_model(tmp_path / "model", make_model(name), make_tokenizer())
    prompts = make_prompts(24)
    new = open_embedder(folder, prompts, tmp_path / "work")
    head = SplitModel(make_model(name), torch.device("cpu")).output_layer(new.spec.head.scale)
    assert head is not None
    read_block, width = spanning_columns(head, new.spec.dimension)
    basis_VR = orthonormal_basis(read_block, new.spec.dimension, width, max_rank=width)
    old = reopened(folder, _with_basis(new, basis_VR), basis="head")
    with torch.inference_mode():
        window = old.pool(old.tokens(prompts), lambda: None)
        unit_NV, coord_NR, _ = (each.numpy() for each in old.unit_rows(window, 0, len(prompts)))
    assert np.abs(coord_NR - unit_NV.astype(np.float64) @ basis_VR).max() <= 1e-6
    assert np.abs(unit_NV - rows_before_rounding(new, prompts)).max() <= 1e-6


_MEMORY = """
import sys
from types import SimpleNamespace
import numpy as np
import torch
from embstore.host.memory import MemoryMeter
from embstore.model.basis import coordinate_map
from embstore.model.finish import finish, make_finisher, spanning_columns
from embstore.model.heads import AffineHead

torch.set_num_threads(2)
columns, width = 151_936, 896
weight_VD = torch.from_file(sys.argv[1], size=columns * width, dtype=torch.bfloat16).view(columns, width)
mean_BD = torch.randn(32, width)
torch.linalg.eigh(mean_BD[:, :32].double())  # what the libraries take for themselves
rows = torch.zeros(32, columns, dtype=torch.float16), torch.zeros(32, width), torch.zeros(32)
with torch.inference_mode(), MemoryMeter() as meter:
    meter.set_baseline()
    head = AffineHead(weight_VD=weight_VD, bias_V=None, scale=1.0)
    read_block, _ = spanning_columns(head, columns)
    map_MR = coordinate_map(read_block, columns, width)
    spec = SimpleNamespace(basis="gram", dimension=columns)
    finish(make_finisher(spec, head, map_MR, torch.device("cpu")), mean_BD, *rows)
    print(meter.peak_anonymous_bytes, float(rows[2].max()))
"""


@pytest.mark.skipif(read_memory() is None, reason="the kernel does not tell anonymous memory (not Linux)")
def test_a_large_head_is_never_in_memory_as_float32(tmp_path: Path) -> None:
    """Map and rows of a mapped head of 0.5B's shape, 545 MB in float32: a few blocks of columns and D x D matrices."""
    block_CD = torch.randn(9496, 896, generator=torch.Generator().manual_seed(0)).bfloat16()
    content = block_CD.view(torch.int16).numpy().tobytes()
    with (tmp_path / "head").open("wb") as file:
        for _ in range(151_936 // 9496):
            file.write(content)
    command = [sys.executable, "-c", _MEMORY, str(tmp_path / "head")]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak, residual = result.stdout.split()
    assert 0 < int(peak) <= 96 << 20
    assert 1e-4 < float(residual) < 5e-4


def _spec(columns: int) -> Any:
    return SimpleNamespace(basis="gram", dimension=columns)


def _with_basis(like: Any, basis_VR: NDArray[np.float32]) -> Any:
    return SimpleNamespace(spec=like.spec, basis_VR=basis_VR)
