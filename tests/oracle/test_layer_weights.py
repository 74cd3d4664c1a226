"""Every tensor that a pass computes with is the one that ``from_pretrained(dtype=...)`` would have loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from embstore.model.backbone import SplitModel
from embstore.model.probe import made_up_rows
from tests.support.models import VOCABULARY, make_model, make_tokenizer, save_model

_GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MORE: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GEMMA),
    "opt-long": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=16384, pad_token_id=1,
    ),
}  # fmt: skip
NAMES = [
    "gemma3", "opt-long", "deepseek-v3", "gpt2", "falcon-h1", "llama-tied", "gemma3n", "gemma2", "mamba", "mixtral",
    "bloom", "modernbert-decoder", "opt-projected", "granite-moe",
]  # fmt: skip


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose tables are large enough to be looked up where they are mapped, stored in bfloat16."""
    torch.manual_seed(0)
    if request.param in MORE:
        model = transformers.AutoModelForCausalLM.from_config(MORE[request.param]())
    else:
        model = make_model(request.param, logit_std=0.0, layers=None if request.param == "gemma3n" else 3)
    for buffer in model.buffers():
        if "bias" in next(name for name, each in model.named_buffers() if each is buffer):
            buffer.uniform_()  # DeepSeek-V3's e_score_correction_bias, which is zero in a new model
    return save_model(tmp_path / "model", model.to(torch.bfloat16), make_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_as_the_class_would_load_it(
    folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embstore.model.layer_weights._SMALL_TABLE_BYTES", 0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = SplitModel(loaded, torch.device("cpu"))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    prefix = next(f"{name}." for name, each in model.module.named_modules() if each is model.backbone and name)
    expected = dict(oracle.get_submodule(prefix[:-1]).named_parameters(remove_duplicate=False))
    buffers = dict(oracle.get_submodule(prefix[:-1]).named_buffers())
    units, tables = model.weights.parts.units, model.weights.parts.tables
    assert len(units) >= 3
    assert tables

    # plain: all of them are there
    model.settle(dtype, None)
    found = dict(model.backbone.named_parameters(remove_duplicate=False))
    assert set(found) == set(expected)
    in_tables = {place.full_name.removeprefix(prefix) for place in tables}
    for name in set(found) - in_tables:
        assert_same(found[name], expected[name], name)
    assert_buffers(model, buffers)

    # layered: a unit's while it is open, and NaN afterwards
    sizes = sorted(model.weights.bytes_of(unit) for unit in units)
    model.settle(dtype, sum(sizes[-2:]))
    seen: set[str] = set()

    def look(unit: Any) -> Callable[[nn.Module, object], None]:
        def compare(module: nn.Module, arguments: object) -> None:
            for place in unit.places:
                name = place.full_name.removeprefix(prefix)
                assert_same(place.module._parameters[place.name], expected[name], name)
                seen.add(name)
            closed = [each for each in units if each not in model.residency.opened and each is not model.residency._loading]  # type: ignore[union-attr]
            assert closed

        return compare

    for unit in units:
        for gate in unit.gates:
            gate.register_forward_pre_hook(look(unit))
    rows_BT = made_up_rows(model)
    with torch.inference_mode():
        model.run([lambda: _discard(model, rows_BT)] * 3)
    assert seen == {place.full_name.removeprefix(prefix) for unit in units for place in unit.places}
    assert seen | in_tables | {place.full_name.removeprefix(prefix) for place in model.weights.parts.base} == set(expected)
    for place in model.weights.parts.base:
        name = place.full_name.removeprefix(prefix)
        assert_same(place.module._parameters[place.name], expected[name], name)
    assert_buffers(model, buffers)
    model.release()
    for unit in units:
        for place in unit.places:
            left = place.module._parameters[place.name]
            assert left is not None
            assert torch.isnan(left).all()
            assert left.untyped_storage().nbytes() <= 8
            assert (left.shape, left.dtype) == (place.stored.shape, expected[place.full_name.removeprefix(prefix)].dtype)


def _discard(model: SplitModel, rows_BT: torch.Tensor) -> None:
    assert torch.isfinite(model.hidden(rows_BT, torch.ones_like(rows_BT, dtype=torch.bool))).all()


def test_rows_of_tables_are_those_of_the_cast_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the class looks up in a way of its own: Gemma scales its embeddings, OPT counts positions from two."""
    monkeypatch.setattr("embstore.model.layer_weights._SMALL_TABLE_BYTES", 0)
    for dtype in (torch.float32, torch.bfloat16):
        model = SplitModel(
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval(), torch.device("cpu")
        )
        oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model.settle(dtype, None)
        for place in model.weights.parts.tables:
            theirs: Any = oracle.get_submodule(place.full_name.rpartition(".")[0])
            own: Any = place.module
            assert own.weight.data_ptr() != place.stored.data_ptr()
            rows = torch.arange(len(place.stored))[:300]
            with torch.inference_mode():
                plain = nn.functional.embedding(rows, own.weight, own.padding_idx)
                assert_same(plain, nn.functional.embedding(rows, theirs.weight), place.full_name)
                if type(own).forward is nn.Embedding.forward or "Scaled" in type(own).__name__:
                    assert_same(own(rows), theirs(rows), place.full_name)
                else:  # positions, by their mask
                    mask = torch.ones((2, 7), dtype=torch.long)
                    assert_same(own(mask, 0), theirs(mask, 0), place.full_name)


def assert_same(found: torch.Tensor | None, expected: torch.Tensor, name: str) -> None:
    assert found is not None, name
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
    assert torch.equal(found, expected), name


def assert_buffers(model: SplitModel, expected: dict[str, torch.Tensor]) -> None:
    found = dict(model.backbone.named_buffers())
    assert set(found) == set(expected)
    for name, buffer in found.items():
        assert_same(buffer, expected[name], name)
