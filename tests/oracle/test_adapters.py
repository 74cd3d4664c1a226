"""PEFT adapters: rows of the adapted model, against peft's own unmerged forward pass in float64."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError
from embstore.model.locate import locate_model
from tests.support.kinds import ADAPTERS, ENCODERS, REFUSED_ADAPTERS, make_kind
from tests.support.models import (
    PROMPTS,
    distances,
    make_model,
    make_tokenizer,
    open_embedder,
    rows_before_rounding,
    save_model,
    unit_mean,
)

peft = pytest.importorskip("peft", reason="peft is not installed (extra embstore[peft])")


def make_adapter(folder: Path, base: Path, named: str) -> Any:
    """A LoRA adapter with random weights over the model at ``base``, which it calls ``named``; the adapted model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)  # they begin as zeros, which adapt nothing
    adapted.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
    return adapted.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", make_model("llama"), make_tokenizer())


@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_rows_are_those_of_the_adapted_model(space: str, base: Path, tmp_path: Path) -> None:
    adapted = make_adapter(tmp_path / "adapter", base, "../base").double()
    tokenizer = make_tokenizer()
    embedder = open_embedder(tmp_path / "adapter", PROMPTS, tmp_path / "work", space=space)
    with torch.inference_mode():
        outputs = [
            adapted(input_ids=torch.tensor([tokenizer(prompt.text).input_ids]), output_hidden_states=True)
            for prompt in PROMPTS
        ]
    values = [each.logits[0] if space == "logits" else each.hidden_states[-1][0] for each in outputs]
    expected_NX = np.stack([unit_mean(each.numpy()) for each in values])
    found_NX = rows_before_rounding(embedder, PROMPTS)
    assert distances(found_NX, expected_NX).max() <= 5e-6
    plain_NX = rows_before_rounding(open_embedder(base, PROMPTS, tmp_path / "work", space=space), PROMPTS)
    assert distances(found_NX, plain_NX).min() > 1e-2


def test_identity_is_of_base_and_adapter_and_not_of_their_place(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, "../base")

    def identity(folder: Path) -> tuple[str, str, str, str]:
        found = locate_model(EmbeddingConfig(model=str(folder))).identity()
        return found.weights_sha256, found.config_sha256, found.tokenizer_sha256, found.architecture

    first = identity(tmp_path / "adapter")
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "adapter", tmp_path / "moved" / "adapter")
    shutil.move(base, tmp_path / "moved" / "elsewhere")
    config = tmp_path / "moved" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "../elsewhere"}))
    assert identity(tmp_path / "moved" / "adapter") == first
    assert first[3] == "LlamaForCausalLM"
    save_model(tmp_path / "moved" / "elsewhere", make_model("llama", seed=5), make_tokenizer())
    changed = identity(tmp_path / "moved" / "adapter")
    assert changed[0] != first[0]
    assert changed[1:] == first[1:]


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, "../other")
    save_model(tmp_path / "other", make_model("gpt2"), make_tokenizer())
    with pytest.raises(ModelError, match="does not fit"):
        open_embedder(tmp_path / "adapter", PROMPTS, tmp_path / "work")


def test_an_adapter_without_its_base_or_its_weights_is_refused(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, "")
    with pytest.raises(ModelError, match="does not name a base model"):
        locate_model(EmbeddingConfig(model=str(tmp_path / "adapter")))
    make_adapter(tmp_path / "second", base, "../base")
    (tmp_path / "second" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        locate_model(EmbeddingConfig(model=str(tmp_path / "second")))


def test_without_peft_the_way_to_install_it_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(tmp_path / "adapter", base, "../base")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="peft is not installed") as caught:
        open_embedder(tmp_path / "adapter", PROMPTS, tmp_path / "work")
    assert "embstore[peft]" in str(caught.value.hint)


def saved_adapter(folder: Path, base: Path, **settings: Any) -> Any:
    """An adapter with random weights; the model that peft itself makes of it, unmerged, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("name", sorted(ADAPTERS))
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_merge_is_that_of_peft_in_the_dtype_that_computes(name: str, tmp_path: Path) -> None:
    kind, settings = ADAPTERS[name]
    base = save_model(tmp_path / "base", make_model(kind).to(torch.bfloat16), make_tokenizer())
    saved_adapter(tmp_path / "adapter", base, **settings)
    loaded = locate_model(EmbeddingConfig(model=str(tmp_path / "adapter"))).load("logits")
    assert type(loaded.model) is type(make_model(kind))
    merges = {id(module.weight): merge for module, merge in loaded.merges.items()}  # type: ignore[arg-type]
    assert len(merges) == len(loaded.merges) > 0
    for dtype in (torch.float32, torch.bfloat16):
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        merged = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload(safe_merge=True)
        expected = dict(merged.named_parameters(remove_duplicate=False))
        for key, parameter in loaded.model.named_parameters(remove_duplicate=False):
            merge = merges.get(id(parameter), lambda weight: weight)
            found = merge(parameter.detach().to(dtype))
            assert found.dtype == dtype
            assert torch.equal(found, expected[key]), key
    stored = dict(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).named_parameters())
    adapted = dict(loaded.model.named_parameters())
    unmerged = [key for key, each in adapted.items() if id(each) in merges]
    assert all(torch.equal(adapted[key], stored[key]) for key in unmerged)  # the base stays as it is


@pytest.mark.parametrize(
    "name",
    [
        "DoRA",
        "modules_to_save: head and embedding",
        "modules_to_save: tied head",
        "LoRA of an untied embedding",
        "trained biases",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_rows_are_those_of_the_unmerged_model(name: str, tmp_path: Path) -> None:
    kind, settings = ADAPTERS[name]
    base = save_model(tmp_path / "base", make_model(kind), make_tokenizer())
    adapted = saved_adapter(tmp_path / "adapter", base, **settings)
    tokenizer = make_tokenizer()
    with torch.inference_mode():
        logits = [adapted(input_ids=torch.tensor([tokenizer(each.text).input_ids])).logits[0] for each in PROMPTS]
    expected_NV = np.stack([unit_mean(each.double().numpy()) for each in logits])
    found_NV = rows_before_rounding(open_embedder(tmp_path / "adapter", PROMPTS, tmp_path / "work"), PROMPTS)
    assert distances(found_NV, expected_NV).max() <= 5e-6


@pytest.mark.parametrize("name", sorted(REFUSED_ADAPTERS))
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_what_cannot_be_merged_a_weight_at_a_time_is_refused(name: str, tmp_path: Path) -> None:
    settings, said = REFUSED_ADAPTERS[name]
    base = save_model(tmp_path / "base", make_model("llama-tied"), make_tokenizer())
    saved_adapter(tmp_path / "adapter", base, **settings)
    with pytest.raises(ModelError, match=said) as caught:
        locate_model(EmbeddingConfig(model=str(tmp_path / "adapter"))).load("logits")
    assert "merge_and_unload" in str(caught.value.hint)


def test_a_learned_prompt_is_not_an_adapter_of_weights(base: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    with pytest.raises(ModelError, match=r"does not change weights|does not fit") as caught:
        locate_model(EmbeddingConfig(model=str(tmp_path / "adapter"))).load("logits")
    assert caught.value.hint


def test_the_base_is_taken_at_the_commit_that_the_adapter_names(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "adapter", base, "org/base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "abc123"}))
    asked: list[tuple[str, str | None]] = []

    def download(model: str, revision: str | None, *, trusted: bool) -> Path:
        asked.append((model, revision))
        return base

    monkeypatch.setattr("embstore.model.locate.download", download)
    locate_model(EmbeddingConfig(model=str(tmp_path / "adapter")))
    assert asked == [("org/base", "abc123")]


def test_a_base_in_the_home_folder_is_found(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    make_adapter(tmp_path / "adapter", base, f"~/{base.name}")
    files = locate_model(EmbeddingConfig(model=str(tmp_path / "adapter")))
    assert files == dataclasses.replace(
        locate_model(EmbeddingConfig(model=str(base))), name="adapter", adapter=tmp_path / "adapter"
    )  # type: ignore[type-var]


def test_an_adapter_of_an_encoder(tmp_path: Path) -> None:
    """Its layers are named as those of the class without a head."""
    kind, make, _ = ENCODERS["BERT"]
    make_kind(kind, make, tmp_path / "base")
    model = transformers.AutoModel.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    adapted = peft.get_peft_model(model, settings).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = make_tokenizer()
    with torch.inference_mode():
        states = [adapted(input_ids=torch.tensor([tokenizer(each.text).input_ids])).last_hidden_state[0] for each in PROMPTS]
    expected_ND = np.stack([unit_mean(each.double().numpy()) for each in states])
    embedder = open_embedder(tmp_path / "adapter", PROMPTS, tmp_path / "work", space="hidden")
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_ND).max() <= 5e-6
