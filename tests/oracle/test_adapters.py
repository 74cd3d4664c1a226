"""PEFT adapters: rows of the adapted model, against peft's own unmerged forward pass in float64."""

from __future__ import annotations

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
