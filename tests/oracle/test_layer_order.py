"""Which order a class can run in, in how much memory; layers that are skipped, repeated or shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embstore.core.config import parse_bytes
from embstore.core.errors import BudgetError, ModelError
from embstore.model.backbone import SplitModel
from embstore.model.probe import examine, made_up_rows
from tests.oracle.test_layered import rows_of
from tests.support.limits import TimeLimit
from tests.support.models import (
    PROMPTS,
    VOCABULARY,
    distances,
    least_model_memory,
    make_model,
    make_tokenizer,
    open_embedder,
    oracle_logits,
    reopened,
    rows_before_rounding,
    save_model,
    unit_mean,
)

CPU = torch.device("cpu")
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SHARED: dict[str, Callable[[], Any]] = {
    "albert": lambda: transformers.AlbertConfig(
        **_SMALL, embedding_size=16, num_hidden_layers=6, num_hidden_groups=3, inner_group_num=2
    ),
    "zamba2": lambda: transformers.Zamba2Config(
        **_SMALL, num_hidden_layers=6, layers_block_type=["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
        mamba_d_state=8, mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1, chunk_size=16, num_mem_blocks=1,
        attention_hidden_size=64, attention_head_dim=16, num_key_value_heads=4, adapter_rank=4,
    ),
    "mllama": lambda: transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **_SMALL, num_hidden_layers=6, num_key_value_heads=2, cross_attention_layers=[1, 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("name", list(SHARED))
def test_layers_that_are_skipped_repeated_or_shared_run_as_they_are(name: str, units: int) -> None:
    """ALBERT calls groups several times, Zamba2 has one block in several layers, Mllama skips layers without images."""
    torch.manual_seed(0)
    kinds = {"albert": "AlbertModel", "zamba2": "Zamba2Model", "mllama": "MllamaTextModel"}
    loaded = getattr(transformers, kinds[name])(SHARED[name]()).eval().requires_grad_(False)
    model, limit = SplitModel(loaded, CPU, headless=True), TimeLimit(120)
    rows_BT = made_up_rows(model)
    batches = [rows_BT[:1, :8], rows_BT, rows_BT[:1], rows_BT[:, :20], rows_BT[1:]]
    found: dict[tuple[str, int], torch.Tensor] = {}

    def job(order: str, index: int) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                real_BT = torch.ones_like(batches[index], dtype=torch.bool)
                found[order, index] = model.hidden(batches[index], real_BT)

        return run

    model.settle(torch.float32, None)
    limit.run(lambda: model.run([job("plain", index) for index in range(len(batches))]))
    sizes = sorted(model.weights.bytes_of(unit) for unit in model.weights.parts.units)
    assert len(sizes) >= 3
    model.settle(torch.float32, sum(sizes[-units:]))
    limit.run(lambda: model.run([job("layered", index) for index in range(len(batches))], limit.check))
    for index in range(len(batches)):
        assert torch.isfinite(found["plain", index]).all()
        assert torch.equal(found["plain", index], found["layered", index])
    model.release()


def test_a_class_that_keeps_a_state_runs_plain_one_batch_at_a_time(tmp_path: Path) -> None:
    """RecurrentGemma keeps states of the last batch in its layers: with two batches at a time sizes did not match."""
    config = transformers.RecurrentGemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        lru_width=32, attention_window_size=64, conv1d_width=4, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    tokenizer = make_tokenizer()
    folder = save_model(tmp_path / "model", model, tokenizer)
    embedder = open_embedder(folder, PROMPTS, tmp_path / "work", threads=2, batch_tokens=64)
    assert embedder.model.is_stateful
    assert embedder.num_workers == 1
    assert embedder.model.residency is None
    logits = oracle_logits(model, [tokenizer(prompt.text).input_ids for prompt in PROMPTS])
    expected = np.stack([unit_mean(each) for each in logits])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected).max() <= 2e-5
    again = reopened(folder, embedder)
    assert again.num_workers == 1
    assert rows_of(again) == rows_of(embedder)
    with pytest.raises(BudgetError, match="keeps a state in its layers, so it runs with all weights in memory"):
        reopened(folder, embedder, model_memory=1)


def _deaf(genuine: Any) -> Callable[..., Any]:
    """The class's forward without its mask, as CPM-Ant's."""
    hears = type(genuine).forward

    def forward(input_ids: torch.Tensor, attention_mask: object = None, **named: object) -> Any:
        return hears(genuine, input_ids=input_ids, **named)

    return forward


@pytest.mark.parametrize("is_deaf", [False, True])
def test_an_encoder_that_ignores_the_mask_is_refused_by_name(is_deaf: bool) -> None:
    torch.manual_seed(0)
    genuine = transformers.AutoModel.from_config(transformers.BertConfig(**_SMALL, num_hidden_layers=2)).eval()
    model = SplitModel(genuine, CPU, headless=True)
    if is_deaf:
        genuine.forward = _deaf(genuine)
    model.settle(torch.float32, None)
    if is_deaf:
        with pytest.raises(ModelError, match="BertModel is not causal and ignores the attention mask"):
            examine(model)
    else:
        assert examine(model)[0].kind == "none"
        assert not model.is_causal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_less_memory_than_two_layers_is_refused_with_the_number_that_works(dtype: str, tmp_path: Path) -> None:
    model = make_model("llama", layers=4, hidden_size=256, intermediate_size=1024)
    folder = save_model(tmp_path / "model", model, make_tokenizer())
    plain = open_embedder(folder, PROMPTS, tmp_path / "work", dtype=dtype)
    least = least_model_memory(plain)
    with pytest.raises(BudgetError, match=f"the two largest layers of LlamaForCausalLM take .* in {dtype}") as caught:
        reopened(folder, plain, model_memory=least - 1)
    words = str(caught.value.hint).split()
    given = parse_bytes(words[words.index("--model-memory") + 1])
    assert least <= given < least + (1 << 20)
    for enough in (least, given):
        layered = reopened(folder, plain, model_memory=enough)
        assert layered.model.residency is not None
        assert layered.model.residency._capacity_bytes <= enough
        layered.close()
    whole = sum(plain.model.weights.bytes_of(unit) for unit in plain.model.weights.parts.units)
    whole += plain.model.weights.base_bytes(plain.model.dtype)
    assert reopened(folder, plain, model_memory=whole).model.residency is None
    assert reopened(folder, plain, model_memory=whole - 1).model.residency is not None
