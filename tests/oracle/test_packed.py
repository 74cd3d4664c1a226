"""Layers packed for oneDNN: the same products, told in the spec, and only where nothing else comes out.

Rows of every class are held against float64 in ``test_embed``, packed where this machine can.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError
from embstore.core.plan import as_stored, refuse_other_input
from embstore.host.memory import read_memory
from embstore.model import packed
from embstore.model.backbone import SplitModel
from embstore.model.basis import coordinate_map
from embstore.model.embed import LogitEmbedder
from embstore.model.finish import AffineFinisher, finish, spanning_columns
from embstore.model.heads import AffineHead
from embstore.model.layer_weights import Weights
from embstore.model.packed import can_pack, expect_packed, packed_for_tokens, packs
from embstore.model.probe import watched_layers
from embstore.model.units import parts_of
from tests.support import records
from tests.support.models import (
    PROMPTS,
    Case,
    distances,
    embed,
    make_model,
    make_tokenizer,
    open_embedder,
    reopened,
    rows_before_rounding,
    save_model,
)

CPU = torch.device("cpu")
CaseOf = Callable[[str], Case]

needs_memory = pytest.mark.skipif(read_memory() is None, reason="the kernel does not tell anonymous memory (not Linux)")
needs_packing = pytest.mark.skipif(not can_pack(CPU), reason="this torch packs no linear layers on this processor")


def printed_by(script: str, *arguments: str) -> list[int]:
    """The numbers that a process of its own prints."""
    result = subprocess.run([sys.executable, "-c", script, *arguments], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [int(word) for word in result.stdout.split()]


def stored_rows(embedder: LogitEmbedder) -> np.ndarray[Any, Any]:
    return np.concatenate([block.emb_BV for block in embed(embedder, PROMPTS)])


def packing(embedder: LogitEmbedder) -> tuple[bool, bool]:
    return embedder.spec.packed_layers, embedder.spec.packed_head


def are_packed(embedder: LogitEmbedder) -> set[bool]:
    layers = embedder.model.backbone.modules()
    return {layer.weight.is_mkldnn for layer in layers if isinstance(layer, nn.Linear)}


@needs_packing
def test_layers_stay_plain_in_a_dtype_that_the_processor_cannot_pack(
    case_of: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX2 alone, oneDNN refuses to pack bfloat16; its refusal ended the build."""
    reorder = torch.ops.mkldnn._reorder_linear_weight

    def refusing(weight: torch.Tensor, num_rows: int) -> Any:
        if weight.dtype == torch.bfloat16:
            raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw")
        return reorder(weight, num_rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refusing)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    folder = case_of("llama").folder
    embedder = open_embedder(folder, PROMPTS, tmp_path, dtype="bfloat16")
    assert packing(embedder) == (False, False)
    assert np.array_equal(stored_rows(reopened(folder, embedder)), stored_rows(embedder))


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_layer_gives_the_product_of_any_input(dtype: torch.dtype, bias: bool) -> None:
    if not packs(dtype):
        pytest.skip(f"this processor packs no weights in {dtype}")
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    weight = layer.weight.clone()
    inputs = [torch.randn(shape).to(dtype) for shape in ((0, 24), (24,), (1, 24), (5, 24), (2, 3, 24), (2, 0, 24))]
    inputs += [torch.randn(24, 7).to(dtype).T, torch.randn(4, 7, 48).to(dtype)[..., ::2], inputs[2].expand(6, 24)]
    offset = 0.0 if layer.bias is None else layer.bias.double()
    layer.weight = nn.Parameter(packed_for_tokens(weight), requires_grad=False)
    expect_packed(layer)
    assert layer.weight.is_mkldnn
    assert (layer.weight.dtype, layer.weight.shape) == (weight.dtype, weight.shape)
    for given in inputs:
        found, exact = layer(given), given.double() @ weight.double().T + offset
        assert found.dtype == dtype
        assert torch.allclose(found.double(), exact, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError):
        nn.functional.linear(inputs[3], layer.weight)  # loud, never wrong
    assert torch.equal(layer.weight.to_dense(), weight)


class Stack(nn.Module):
    """Layers in a list, called one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            given = layer(given)
        return given


@needs_packing
@torch.inference_mode()
def test_layers_are_packed_and_unpacked_from_what_is_stored() -> None:
    stack = Stack([nn.Linear(8, 8), nn.Linear(8, 8)]).requires_grad_(False)
    given, stored = torch.randn(3, 8), [layer.weight for layer in stack.layers]
    copies, expected = [weight.clone() for weight in stored], stack(given)
    weights = Weights(stack, parts_of(stack, ""), {}, CPU)
    for packed_layers in ([], list(stack.layers), [stack.layers[1]], []):
        weights.settle(torch.float32, packed_layers)
        for unit in weights.parts.units:
            weights.make(unit)()
        assert [layer for layer in stack.layers if layer.weight.is_mkldnn] == packed_layers
        assert [layer for layer in stack.layers if "forward" in vars(layer)] == packed_layers
        assert torch.allclose(stack(given), expected, rtol=1e-5, atol=1e-6)
        dense = [layer.weight.to_dense() if layer.weight.is_mkldnn else layer.weight for layer in stack.layers]
        assert all(torch.equal(found, copy) for found, copy in zip(dense, copies, strict=True))
    assert all(torch.equal(weight, copy) for weight, copy in zip(stored, copies, strict=True))


@needs_packing
def test_only_plain_layers_are_watched_with_the_tokens_they_get() -> None:
    class Own(nn.Linear):
        pass

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.part, self.own = nn.Linear(8, 8), nn.Linear(8, 8), Own(8, 8)
            self.unused, self.small, self.patched = nn.Linear(8, 8), nn.Linear(8, 8).half(), nn.Linear(8, 8)
            self.patched.forward = lambda given: given  # type: ignore[method-assign]
            self.named = nn.Linear(8, 8)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            mixed = self.own(self.whole(given)) + self.small(given.half()).sum() + self.named(input=given)
            return self.patched(mixed) + self.part(given[:, :3]).sum()

    layers = Layers()
    with watched_layers(layers) as seen:
        layers(torch.zeros(2, 5, 8))
    assert seen == {layers.whole: {10}, layers.part: {6}}
    assert not layers.whole._forward_pre_hooks


@needs_packing
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_build_packs_and_a_reopened_one_gives_the_same_bytes(case_of: CaseOf, dtype: str, tmp_path: Path) -> None:
    folder = case_of("llama").folder
    embedder = open_embedder(folder, PROMPTS, tmp_path, dtype=dtype)
    is_packed = packs(getattr(torch, dtype))
    assert packing(embedder) == (is_packed, is_packed)
    assert are_packed(embedder) == {is_packed}
    again = reopened(folder, embedder)
    assert are_packed(again) == {is_packed}
    assert stored_rows(again).tobytes() == stored_rows(embedder).tobytes()


@needs_packing
@pytest.mark.parametrize("columns", [320, 513, 1100])  # the last block has one column, or many
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_head_gives_the_rows_of_float64(columns: int, bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    weight_VD, mean_BD = torch.randn(columns, 24, generator=random), torch.randn(7, 24, generator=random)
    bias_V = torch.randn(columns, generator=random) if bias else None
    head = AffineHead(weight_VD=weight_VD, bias_V=bias_V, scale=0.5)
    read_block, width = spanning_columns(head, columns)
    map_MR = coordinate_map(read_block, columns, width, scale=head.scale)
    finisher = AffineFinisher(head, map_MR, columns, CPU)
    finisher.pack()
    out_BV, coord_BR = torch.empty(7, columns, dtype=torch.float16), torch.empty(7, map_MR.shape[1])
    finish(finisher, mean_BD, out_BV, coord_BR, torch.empty(7))
    exact_BV = mean_BD.double() @ weight_VD.double().T + (0 if bias_V is None else bias_V.double())
    exact_BV /= exact_BV.norm(dim=1, keepdim=True)
    assert torch.linalg.vector_norm(out_BV.double() - exact_BV, dim=1).max() <= 3e-4  # of float16
    unit_BV = torch.cat(
        [unit_BC.clone() for _, unit_BC in finisher.unit_blocks(mean_BD, finisher.coordinates(mean_BD)[1])], 1
    )
    assert torch.linalg.vector_norm(unit_BV.double() - exact_BV, dim=1).max() <= 1e-6


@needs_packing
@pytest.mark.parametrize("name", ["llama-tied", "phi", "granite"])
def test_a_store_with_a_plain_head_is_continued_with_one(case_of: CaseOf, name: str) -> None:
    case = case_of(name)
    assert packing(case.embedder) == (True, True)
    older = reopened(case.folder, case.embedder, packed_head=False)
    assert are_packed(older) == {True}
    assert older._finisher._packed == []
    found_NV = rows_before_rounding(older, PROMPTS)
    assert distances(found_NV, case.rows_NV).max() <= 2e-6


@needs_packing
@pytest.mark.parametrize(("name", "settings"), [("gemma2", {}), ("nanochat", {}), ("llama", {"space": "hidden"})])
def test_heads_that_are_no_product_are_not_packed(
    case_of: CaseOf, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    embedder = open_embedder(case_of(name).folder, PROMPTS, tmp_path, **settings)
    assert packing(embedder) == (True, False)
    assert stored_rows(reopened(case_of(name).folder, embedder)).tobytes() == stored_rows(embedder).tobytes()


@needs_packing
def test_a_packed_head_is_the_only_float32_copy(case_of: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored weight stays where the file is mapped; what it was cast to goes."""
    plain: list[StorageWeakRef] = []
    genuine = SplitModel.output_layer

    def output_layer(self: SplitModel, scale: float = 1.0) -> AffineHead | None:
        layer = genuine(self, scale)
        assert layer is not None
        plain.append(StorageWeakRef(layer.weight_VD.untyped_storage()))
        return layer

    monkeypatch.setattr(SplitModel, "output_layer", output_layer)
    folder = save_model(tmp_path / "model", copy.deepcopy(case_of("llama").model).bfloat16(), make_tokenizer())
    embedder = open_embedder(folder, PROMPTS, tmp_path / "work")
    assert packing(embedder) == (True, True)
    gc.collect()
    assert len(plain) >= 2  # for the probe, and for the rows
    stored = embedder.model.module.get_output_embeddings().weight
    kept = [each for each in plain if not each.expired()]
    assert {each.cdata for each in kept} <= {StorageWeakRef(stored.untyped_storage()).cdata}
    assert stored.dtype == torch.bfloat16


@needs_packing
def test_what_does_not_fit_the_memory_is_left_unpacked_and_stays_so(case_of: CaseOf, tmp_path: Path) -> None:
    case = case_of("llama")
    kernels = case.embedder.memory_bytes(16)
    embedder = open_embedder(case.folder, PROMPTS, tmp_path, memory_bytes=kernels - 1)
    assert packing(embedder) == (False, False)
    assert embedder.memory_bytes(16) < kernels
    assert are_packed(embedder) == {False}
    again = reopened(case.folder, embedder)
    assert are_packed(again) == {False}
    assert stored_rows(again).tobytes() == stored_rows(embedder).tobytes()
    assert distances(rows_before_rounding(embedder, PROMPTS), case.rows_NV).max() <= 2e-6


@needs_packing
@pytest.mark.parametrize("fails", ["raises", "gives something else"])
def test_a_class_that_minds_is_left_as_it_was(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = transformers.models.llama.modeling_llama.LlamaMLP.forward

    def forward(self: Any, given: torch.Tensor) -> torch.Tensor:
        if fails == "raises":
            self.up_proj(given)  # called, and its weight used besides
            return self.down_proj(self.act_fn(self.gate_proj(given)) * nn.functional.linear(given, self.up_proj.weight))
        return genuine(self, given) * (1 + self.up_proj.weight.is_mkldnn)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    folder = save_model(tmp_path / "model", make_model("llama"), make_tokenizer())
    embedder = open_embedder(folder, PROMPTS, tmp_path / "work")
    assert packing(embedder) == (False, False)
    assert are_packed(embedder) == {False}
    monkeypatch.setattr(packed, "_OPERATORS", ("no such operator",))
    never_tried = open_embedder(folder, PROMPTS, tmp_path / "work")
    assert stored_rows(embedder).tobytes() == stored_rows(never_tried).tobytes()


@needs_packing
def test_a_layer_that_is_given_some_tokens_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of a mixture: every number of tokens would leave a kernel in memory."""
    genuine = transformers.models.llama.modeling_llama.LlamaMLP.forward

    def forward(self: Any, given: torch.Tensor) -> torch.Tensor:
        half = given.shape[1] // 2
        return torch.cat([genuine(self, given[:, :half]), genuine(self, given[:, half:])], dim=1)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    folder = save_model(tmp_path / "model", make_model("llama"), make_tokenizer())
    embedder = open_embedder(folder, PROMPTS, tmp_path / "work")
    assert embedder.spec.packed_layers
    for layer in embedder.model.backbone.layers:
        for block, is_packed in ((layer.self_attn, True), (layer.mlp, False)):
            assert {each.weight.is_mkldnn for each in block.modules() if isinstance(each, nn.Linear)} == {is_packed}


@needs_packing
def test_a_packed_store_is_not_continued_by_a_torch_that_cannot(case_of: CaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("llama")
    monkeypatch.setattr(packed, "_OPERATORS", ("no such operator",))
    with pytest.raises(ModelError, match="packed layers, which this version of torch cannot pack") as caught:
        reopened(case.folder, case.embedder)
    assert "versions of torch and transformers" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("stored", "given", "drift"),
    [
        (("AVX2", 0, 0), ("AVX2", 1, 0), []),  # it did not fit any more, or an older version began it: left so
        (("AVX2", 1, 0), ("AVX2", 1, 0), []),
        (("AVX2", 1, 0), ("AVX2", 0, 0), ["packed_layers"]),
        (("AVX2", 0, 0), ("AVX512", 1, 0), ["capability"]),
        (("AVX2", 0, 0), ("AVX2", 1, 1), []),
        (("AVX2", 1, 0), ("AVX2", 1, 1), []),  # a capped head, or an older version
        (("AVX2", 1, 1), ("AVX2", 1, 1), []),
        (("AVX2", 1, 1), ("AVX2", 0, 0), ["packed_layers", "packed_head"]),
        (("AVX2", 1, 1), ("AVX512", 1, 1), ["capability"]),
    ],
)
def test_layers_are_packed_as_the_store_has_them(
    stored: tuple[str, int, int], given: tuple[str, int, int], drift: list[str]
) -> None:
    names = ("capability", "packed_layers", "packed_head")
    as_fields = [(values[0], bool(values[1]), bool(values[2])) for values in (stored, given)]
    fields, found = (dict(zip(names, values, strict=True)) for values in as_fields)
    spec = records.spec(embedding=dataclasses.replace(records.EMBEDDING, **fields))
    hardware = as_stored({"device": "cpu", "threads": 2, **found}, spec.embedding)
    assert [each.field for each in refuse_other_input(spec, EmbeddingConfig(), None, hardware)] == drift
    for name in names[1:]:
        assert hardware[name] == (found[name] and fields[name])


_HEIGHTS = """
import numpy as np
import torch
from embstore.model.finish import SLAB_ROWS, AffineFinisher
from embstore.model.heads import AffineHead
from embstore.host.memory import MemoryMeter

torch.set_num_threads(1)
head = AffineHead(weight_VD=torch.randn(1100, 256), bias_V=None, scale=1.0)
finisher = AffineFinisher(head, np.eye(256, 8, dtype=np.float32), 1100, torch.device("cpu"))
finisher.pack()
with torch.inference_mode(), MemoryMeter() as meter:
    meter.set_baseline()
    for rows in range(1, SLAB_ROWS + 1):
        sum(block.sum() for _, block in finisher.unit_blocks(torch.ones(rows, 256), torch.ones(rows)))
    print(meter.peak_anonymous_bytes)
"""


@needs_packing
@needs_memory
def test_slabs_of_any_height_leave_few_kernels() -> None:
    """Where some rows of a window are copied, those that are computed end in a slab of any height."""
    assert printed_by(_HEIGHTS)[0] <= 24 << 20  # 390 MiB where heights are what they are


_PACKING = """
import sys
import torch
from torch import nn
from embstore.host.memory import MemoryMeter, read_memory
from embstore.model.packed import packed_for_tokens
from embstore.model.units import parts_of
from embstore.model.layer_weights import Weights

stack = nn.Module()
stored = getattr(torch, sys.argv[1])
stack.layers = nn.ModuleList([nn.Linear(2048, 2048).to(stored).requires_grad_(False) for _ in range(16)])
packed_for_tokens(torch.zeros(2048, 2048))
weights = Weights(stack, parts_of(stack, ""), {}, torch.device("cpu"))
weights.settle(torch.float32)
before = read_memory().anonymous_bytes
with MemoryMeter() as meter:
    meter.set_baseline()
    weights.settle(torch.float32, list(stack.layers))
    for unit in weights.parts.units:
        weights.make(unit)()
    print(meter.peak_anonymous_bytes)
    weights.settle(torch.bfloat16)
    print(read_memory().anonymous_bytes - before)
"""


@needs_packing
@needs_memory
@pytest.mark.parametrize("stored", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_packed_layers_are_in_memory_once_beside_what_is_stored(stored: str) -> None:
    """Neither what they were cast to stays, nor holes between them, nor what is dropped."""
    packed_bytes, dropped_bytes = printed_by(_PACKING, stored)
    assert 128 << 20 <= packed_bytes <= (256 + 64) << 20  # 16 layers of 16 MiB
    assert dropped_bytes <= 64 << 20
