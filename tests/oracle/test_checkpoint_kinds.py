"""Every kind of checkpoint: rows of the unmodified class, one unpadded prompt at a time, or a refusal by name.

``docs/models.md`` has a table of these kinds; the last test compares it with what is established here.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError
from embstore.core.prompts import Prompt
from embstore.model.locate import locate_model
from tests.support.kinds import (
    ENCODER_DECODERS,
    ENCODERS,
    MULTIMODAL,
    REFUSED,
    as_8_bits,
    change_config,
    documented_rows,
    make_kind,
)
from tests.support.models import (
    CONFIGS,
    PROMPTS,
    distances,
    make_model,
    make_tokenizer,
    open_embedder,
    rows_before_rounding,
    save_model,
    unit_mean,
)

ROOT = Path(__file__).parents[2]


def class_rows(model: Any, prompts: list[Prompt], *, logits: bool, longest: int | None = None) -> NDArray[np.float64]:
    """Unit rows by the class itself, in float32."""
    tokenizer = make_tokenizer()
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            output = model(input_ids=torch.tensor([tokenizer(prompt.text).input_ids[:longest]]))
            rows.append(unit_mean((output.logits if logits else output.last_hidden_state)[0].double().numpy()))
    return np.stack(rows)


def text_part(model: Any) -> Any:
    """transformers 5.24's Llama 4 fails on text alone: it asks its language model's output for images."""
    return model.language_model if type(model).__name__ == "Llama4ForConditionalGeneration" else model


@pytest.mark.parametrize("name", sorted(MULTIMODAL))
@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_a_multimodal_model_given_text(name: str, space: str, tmp_path: Path) -> None:
    whole = text_part(make_kind(*MULTIMODAL[name], tmp_path / "model"))
    embedder = open_embedder(tmp_path / "model", PROMPTS, tmp_path / "work", space=space)
    if space == "logits":
        expected_NX = class_rows(whole, PROMPTS, logits=True)
        assert embedder.spec.head.kind == "affine"
    else:
        inner = whole.model if hasattr(whole, "model") else whole.base_model
        expected_NX = class_rows(inner, PROMPTS, logits=False)
    assert embedder.model.is_causal
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_NX).max() <= 2e-6


@pytest.mark.parametrize("name", sorted(ENCODER_DECODERS))
def test_an_encoder_decoder_has_hidden_states_of_its_encoder_and_no_logits(name: str, tmp_path: Path) -> None:
    model = make_kind(*ENCODER_DECODERS[name], tmp_path / "model")
    with pytest.raises(ModelError, match=r"model is an encoder-decoder \(\w+\)") as caught:
        open_embedder(tmp_path / "model", PROMPTS, tmp_path / "work")
    assert "--space hidden" in str(caught.value.hint)
    embedder = open_embedder(tmp_path / "model", PROMPTS, tmp_path / "work", space="hidden")
    assert not embedder.model.is_causal
    expected_NX = class_rows(model.get_encoder(), PROMPTS, logits=False)
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_NX).max() <= 2e-6


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_takes_as_many_tokens_as_its_table_of_positions_has(name: str, tmp_path: Path) -> None:
    """The long prompt would end in an IndexError in the classes whose table begins at an offset."""
    kind, make, longest = ENCODERS[name]
    model = make_kind(kind, make, tmp_path / "model")
    prompts = [*PROMPTS, Prompt(id=None, text="the " * 700)]
    embedder = open_embedder(tmp_path / "model", prompts, tmp_path / "work", space="hidden", max_tokens=600)
    assert embedder.spec.max_tokens == longest
    inner = model.get_encoder() if kind == "T5EncoderModel" else model.base_model
    expected_NX = class_rows(inner, prompts, logits=False, longest=longest)
    assert distances(rows_before_rounding(embedder, prompts), expected_NX).max() <= 2e-6


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_a_class_that_cannot_be_right_is_refused_by_name(name: str, space: str, tmp_path: Path) -> None:
    kind, make, said = REFUSED[name]
    make_kind(kind, make, tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        open_embedder(tmp_path / "model", PROMPTS, tmp_path / "work", space=space)
    assert caught.value.hint
    assert "transformers has no class" in caught.value.message or said in caught.value.message


def _longrope() -> Any:
    """Phi-3's: other frequencies for every position of a batch of more than 16 tokens."""
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0], "rope_theta": 10000.0}
    config = CONFIGS["phi3"]()
    return transformers.Phi3Config(
        **{key: getattr(config, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=16,
        rope_scaling=rope if not hasattr(transformers, "initialization") else rope | {"rope_type": "longrope"},
        pad_token_id=1,
        eos_token_id=1,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_batch_mates_where_frequencies_depend_on_length(threads: int, tmp_path: Path) -> None:
    """Rows of 2 to 48 tokens, on both sides of the limit: padded beyond it, a short one moves by 7e-4."""
    model = make_kind("Phi3ForCausalLM", _longrope, tmp_path / "model")
    tokenizer = make_tokenizer()
    lengths = [len(tokenizer(each.text).input_ids) for each in PROMPTS]
    assert min(lengths) <= 16 < max(lengths)
    # each alone: the frequencies stay in the module
    expected_NV = class_rows(model, PROMPTS, logits=True)
    embedder = open_embedder(tmp_path / "model", PROMPTS, tmp_path / "work", threads=threads, batch_tokens=256)
    for _ in range(3):
        assert distances(rows_before_rounding(embedder, PROMPTS), expected_NV).max() <= 2e-6


# --- quantised weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_weights_in_8_bits_are_the_dequantised_model(name: str, tmp_path: Path) -> None:
    """Against transformers' own dequantisation; with kernels a GPU would round activations too."""
    folder = save_model(tmp_path / "model", make_model(name), make_tokenizer())
    as_8_bits(folder, block=16)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    ).float()
    found = locate_model(EmbeddingConfig(model=str(folder))).load("logits").model
    assert {each.dtype for each in found.parameters()} == {torch.bfloat16}
    tensors = dict(found.named_parameters())
    assert all(torch.equal(tensors[name].float(), each) for name, each in expected.named_parameters())
    rows_NV = rows_before_rounding(open_embedder(folder, PROMPTS, tmp_path / "work"), PROMPTS)
    assert distances(rows_NV, class_rows(expected, PROMPTS, logits=True)).max() <= 2e-6


def test_weights_in_4_bits_are_the_dequantised_model(tmp_path: Path) -> None:
    """gpt-oss as published: experts in MXFP4, all else in bfloat16. transformers dequantises it on a CPU without kernels."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
        max_position_embeddings=128, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    folder = save_model(tmp_path / "model", transformers.GptOssForCausalLM(config).to(torch.bfloat16), make_tokenizer())
    (path,) = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 126, (experts, rows, width // 32), dtype=torch.uint8)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    found = dict(locate_model(EmbeddingConfig(model=str(folder))).load("logits").model.named_parameters())
    assert all(torch.equal(found[name], each) for name, each in expected.named_parameters())
    rows_NV = rows_before_rounding(open_embedder(folder, PROMPTS, tmp_path / "work"), PROMPTS)
    assert distances(rows_NV, class_rows(expected.float(), PROMPTS, logits=True)).max() <= 2e-6


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_lists_what_is_established_here() -> None:
    """Rows are made of the cases that the tests of this file, of adapters and of weight files run over."""
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    start = lines.index("| format | CPU | CUDA |")
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]))
    assert table == [f"| {' | '.join(row)} |" for row in documented_rows()]
