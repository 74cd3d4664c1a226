"""Weights of a model in memory, against those of a store built from the same model on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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


def test_adapters_count_as_they_stand_in_the_model() -> None:
    """Disabled ones change nothing; those that are merged into the base already are not merged again."""
    tokenizer = make_tokenizer()
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(make_model("llama"), settings)

    def weights() -> Any:
        return embstore.DensityAwareSampler(TEXTS[:40], adapted, tokenizer, "cpu", k=5).density_weights

    active = weights()
    with adapted.disable_adapter():
        assert total_variation(weights(), active) > 0.01
        plain = embstore.DensityAwareSampler(TEXTS[:40], make_model("llama"), tokenizer, "cpu", k=5).density_weights
        assert np.array_equal(weights(), plain)
    adapted.merge_adapter()
    assert total_variation(weights(), active) < 1e-4
    with adapted.disable_adapter(), pytest.raises(ModelError, match="is disabled, and merged into") as caught:
        weights()
    assert "unmerge_adapter" in str(caught.value.hint)


def test_adapters_that_change_no_weights_are_refused() -> None:
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ModelError, match="the adapter of LlamaForCausalLM does not change weights"):
        embstore.DensityAwareSampler(TEXTS, peft.get_peft_model(make_model("llama"), settings), make_tokenizer(), "cpu")


def test_a_model_with_flash_attention_keeps_it_and_has_the_weights_of_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels run on GPUs only and refuse float32; here a double that does, under their name."""
    asked: list[torch.dtype] = []

    def kernel(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(query.dtype)
        if query.dtype == torch.float32:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", kernel)
    model, tokenizer = make_model("llama").bfloat16(), make_tokenizer()
    plain = embstore.DensityAwareSampler(TEXTS[:40], model, tokenizer, "cpu", k=5)
    model.config._attn_implementation = "flash_attention_2"
    flash = embstore.DensityAwareSampler(TEXTS[:40], model, tokenizer, "cpu", k=5)
    assert np.array_equal(flash.density_weights, plain.density_weights)
    assert model.config._attn_implementation == "flash_attention_2"
    assert not asked
    model(torch.tensor([[5, 6]]))
    assert asked == [torch.bfloat16] * model.config.num_hidden_layers


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def fsdp2(model: Any) -> Any:
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    return model


def fsdp1(model: Any) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1_layers(model: Any) -> Any:
    model.model.layers = torch.nn.ModuleList(fsdp1(layer) for layer in model.model.layers)
    return model


def zero3(model: Any) -> Any:
    """What deepspeed.zero.Init leaves of a parameter (DeepSpeed 0.18, which needs a compiler to be installed)."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = torch.empty(0)
    return model


@pytest.mark.filterwarnings("ignore:FullyShardedDataParallel|.*FSDP")
@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (fsdp2, r"\S*embed_tokens\.weight is not whole in this process, because of FSDP2"),
        (fsdp1, "FullyShardedDataParallel is not whole in this process, because of FSDP"),
        (fsdp1_layers, r"LlamaForCausalLM\.model\.layers\.0 is not whole in this process, because of FSDP"),
        (zero3, r"\S*embed_tokens\.weight is not whole in this process, because of DeepSpeed ZeRO-3"),
    ],
)
@pytest.mark.usefixtures("process_group")
def test_a_model_that_is_not_whole_in_this_process_is_refused(shard: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        embstore.DensityAwareSampler(TEXTS, shard(make_model("llama")), make_tokenizer(), "cpu")
    assert "embstore build PROMPTS --model MODEL --out STORE" in str(caught.value.hint)


@pytest.mark.usefixtures("process_group")
def test_a_model_under_ddp_is_the_model_and_another_wrapper_is_refused() -> None:
    """DDP copies the weights into every process; of an engine nothing is known."""
    model, tokenizer = make_model("llama").requires_grad_(True), make_tokenizer()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    found = embstore.DensityAwareSampler(TEXTS[:40], wrapped, tokenizer, "cpu", k=5).density_weights
    assert np.array_equal(found, embstore.DensityAwareSampler(TEXTS[:40], model, tokenizer, "cpu", k=5).density_weights)
    with pytest.raises(ModelError, match="Sequential is not a model of transformers") as caught:
        embstore.DensityAwareSampler(TEXTS, torch.nn.Sequential(model), tokenizer, "cpu")
    assert "unwrap_model" in str(caught.value.hint)
