"""Weights of a model in memory, against those of a store built from the same model on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import embstore
from embstore.core.config import BuildConfig, EmbeddingConfig, WeightingConfig
from embstore.core.diagnostics import total_variation
from embstore.core.errors import ConfigError, ModelError, PromptError
from tests.support.models import make_model, make_prompts, make_tokenizer, save_model

TEXTS = [prompt.rendered for prompt in make_prompts(60, seed=3)]


def test_weights_are_those_of_a_build_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model, tokenizer = make_model("gemma2").train().requires_grad_(True).bfloat16(), make_tokenizer()
    before = copy.deepcopy(model.state_dict())
    online = embstore.DensityAwareSampler([*TEXTS, TEXTS[0], TEXTS[0]], model, tokenizer, torch.device("cpu"), k=5)

    save_model(tmp_path / "model", copy.deepcopy(model).float(), tokenizer)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    config = BuildConfig(
        embedding=EmbeddingConfig(model=str(tmp_path / "model"), device="cpu", threads=1), weighting=WeightingConfig(k=5)
    )
    embstore.build(file, out=tmp_path / "store", config=config)
    offline = embstore.open_store(tmp_path / "store").weights.astype(np.float64)

    weights = online.density_weights
    assert weights.shape == (62,)
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert weights[0] == weights[60] == weights[61] == pytest.approx(offline[0] / 3)
    assert total_variation(np.append(weights[:1] * 3, weights[1:60]), offline) < 1e-5
    assert offline.std() > 0.05 * offline.mean()
    assert model.training
    assert all(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_a_build_refuses_is_refused() -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    with pytest.raises(PromptError, match="1 of 61 lines"):
        embstore.DensityAwareSampler([*TEXTS, " "], model, tokenizer, "cpu")
    with pytest.raises(ConfigError, match=r"k must lie in 1\.\.32"):
        embstore.DensityAwareSampler(TEXTS, model, tokenizer, "cpu", k=33)


def test_a_model_with_an_adapter_has_the_weights_of_the_merged_one() -> None:
    """As a trainer with LoRA hands it over; it stays as it is."""
    torch.manual_seed(3)
    base, tokenizer = make_model("llama"), make_tokenizer()
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    online = embstore.DensityAwareSampler(TEXTS, adapted, tokenizer, "cpu", k=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())
    merged = embstore.DensityAwareSampler(TEXTS, adapted.merge_and_unload(), tokenizer, "cpu", k=5)
    plain = embstore.DensityAwareSampler(TEXTS, make_model("llama"), tokenizer, "cpu", k=5)
    # a pass in bfloat16 merges in bfloat16
    apart = total_variation(online.density_weights, merged.density_weights)
    assert apart < 1e-3
    assert total_variation(online.density_weights, plain.density_weights) > 20 * apart


@pytest.mark.parametrize("mark", ["ds_id", "device_mesh"])
def test_a_model_that_is_not_whole_in_this_process_is_refused(mark: str) -> None:
    """As ZeRO-3 and FSDP leave it: the parameters of one process are parts."""
    model = make_model("llama")
    setattr(model.get_input_embeddings().weight, mark, 1)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM\.\S*embed_tokens\.weight is not whole in this process"):
        embstore.DensityAwareSampler(TEXTS, model, make_tokenizer(), "cpu")
