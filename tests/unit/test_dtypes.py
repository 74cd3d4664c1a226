"""The dtype rules and computed buffers of classes, against ``from_pretrained`` itself, tensor by tensor.

Classes with rules of their own: float32 for named parameters (T5, DeepSeek-V3, GPT-OSS, Nemotron-H), parameters made in
float32 (Mamba, Qwen3-Next), buffers computed under the default dtype (the embedding scale of Gemma), persistent buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from embstore.core.errors import ModelError
from embstore.model.dtypes import compute_dtypes, fresh_buffers, length_limit, stored_dtype
from tests.support.kinds import VISION
from tests.support.models import CONFIGS

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _t5() -> Any:
    return transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )


def _bart() -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return transformers.BartConfig(vocab_size=96, d_model=32, **sizes, **heads)


def _roberta() -> Any:
    return transformers.RobertaConfig(**{key: value for key, value in _SMALL.items() if key != "num_key_value_heads"})


def _gemma3() -> Any:
    text = transformers.Gemma3TextConfig(**_SMALL, head_dim=8, sliding_window=8)
    return transformers.Gemma3Config(text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=4)


def _phi3() -> Any:
    factors = [1.0, 1.5, 2.0, 4.0]
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": factors, "rope_theta": 10000.0}
    return transformers.Phi3Config(
        **_SMALL, rope_scaling=rope | {"original_max_position_embeddings": 16}, original_max_position_embeddings=16
    )


# name: (class, configuration)
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    **{
        name: ("AutoModelForCausalLM", CONFIGS[name])
        for name in ("llama", "llama-tied", "gpt2", "gptj", "opt", "bloom", "falcon-h1", "mamba", "deepseek-v3", "gemma2")
    },
    "gemma3n": ("AutoModelForCausalLM", CONFIGS["gemma3n"]),
    "gemma3-text": (
        "AutoModelForCausalLM",
        lambda: transformers.Gemma3TextConfig(**_SMALL, head_dim=8, sliding_window=8),
    ),
    "gemma3": ("AutoModelForImageTextToText", _gemma3),
    "phi3-longrope": ("AutoModelForCausalLM", _phi3),
    "t5": ("AutoModelForSeq2SeqLM", _t5),
    "t5-encoder": ("T5EncoderModel", _t5),
    "bart": ("AutoModelForSeq2SeqLM", _bart),
    "roberta": ("AutoModel", _roberta),
    "mamba2": (
        "AutoModelForCausalLM",
        lambda: transformers.Mamba2Config(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=4,
            head_dim=16,
            n_groups=1,
            chunk_size=8,
        ),
    ),
    "gpt-oss": (
        "AutoModelForCausalLM",
        lambda: transformers.GptOssConfig(
            **_SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
        ),
    ),
    "granite-moe-hybrid": (
        "AutoModelForCausalLM",
        lambda: transformers.GraniteMoeHybridConfig(
            **_SMALL,
            layer_types=["mamba", "attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=16,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_chunk_size=8,
        ),
    ),
    "qwen3-next": (
        "AutoModelForCausalLM",
        lambda: transformers.Qwen3NextConfig(
            **_SMALL,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "nemotron-h": (
        "AutoModelForCausalLM",
        lambda: transformers.NemotronHConfig(
            **_SMALL,
            head_dim=8,
            layers_block_type=["mamba", "moe"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            chunk_size=8,
            n_groups=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
        ),
    ),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    """A class, and folders of one random model of it in three dtypes."""
    kind, make = CASES[request.param]
    loader = getattr(transformers, kind)
    torch.manual_seed(0)
    model = loader.from_config(make()) if kind.startswith("Auto") else loader(make())
    folders = {}
    for dtype in ("float32", "bfloat16", "float16"):
        folders[dtype] = tmp_path_factory.mktemp(request.param) / dtype
        model.to(getattr(torch, dtype)).save_pretrained(folders[dtype])
    return loader, folders


def non_persistent(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_buffers() if name not in model.state_dict()}


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_computed_buffers_are_those_of_from_pretrained(
    saved: tuple[Any, dict[str, Path]], asked: torch.dtype
) -> None:
    loader, folders = saved
    for stored, folder in folders.items():
        loaded = loader.from_pretrained(folder, dtype=getattr(torch, stored))
        expected = loader.from_pretrained(folder, dtype=asked)
        computed = non_persistent(expected)
        held = itertools.chain(expected.named_parameters(), expected.named_buffers())
        assert compute_dtypes(loaded, asked) == {name: each.dtype for name, each in held if name not in computed}
        found = fresh_buffers(loaded, asked)
        assert {name: each.dtype for name, each in found.items()} == {name: each.dtype for name, each in computed.items()}
        assert all(torch.equal(found[name], computed[name]) for name in found)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_encoder_of_an_encoder_decoder_has_the_same_rules(name: str, tmp_path: Path) -> None:
    transformers.AutoModelForSeq2SeqLM.from_config(CASES[name][1]()).save_pretrained(tmp_path)
    expected = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16).get_encoder()
    encoder = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32).get_encoder()
    assert compute_dtypes(encoder, torch.float16) == {name: each.dtype for name, each in expected.named_parameters()}
    assert fresh_buffers(encoder, torch.float16).keys() == non_persistent(encoder).keys()


def test_rules_differ_where_they_should() -> None:
    """Otherwise the comparison above would pass for a function that returns the asked dtype."""
    made = {name: transformers.AutoModelForCausalLM.from_config(CASES[name][1]()) for name in ("deepseek-v3", "gemma2")}
    router = compute_dtypes(made["deepseek-v3"], torch.bfloat16)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert router == torch.float32
    scales = [
        fresh_buffers(made["gemma2"], dtype)["model.embed_tokens.embed_scale"] for dtype in (torch.float32, torch.bfloat16)
    ]
    assert scales[0].item() == pytest.approx(32**0.5, abs=1e-6)
    assert scales[1].item() == 5.65625


def test_no_weight_is_allocated() -> None:
    """A class whose weights would take 64 TB."""
    config = transformers.LlamaConfig(
        **(_SMALL | {"vocab_size": 1 << 20, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "head_dim": 8})
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert set(compute_dtypes(model, torch.bfloat16).values()) == {torch.bfloat16}
    assert {each.device.type for each in fresh_buffers(model, torch.bfloat16).values()} == {"cpu"}
    assert torch.get_default_dtype() == torch.float32


def test_the_stored_dtype_is_that_of_most_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    model[0].to(torch.bfloat16)
    assert stored_dtype(model) == torch.bfloat16
    assert stored_dtype(torch.nn.Identity()) == torch.float32


def test_a_model_of_another_library_is_cast_whole() -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(1), persistent=False)
    model.register_buffer("steps", torch.ones(1, dtype=torch.long))
    assert compute_dtypes(model, torch.bfloat16) == {"weight": torch.bfloat16, "bias": torch.bfloat16, "steps": torch.long}
    assert fresh_buffers(model, torch.bfloat16)["scale"].dtype == torch.bfloat16


def test_a_class_that_cannot_be_made_again_is_refused_by_name() -> None:
    class Once(transformers.LlamaForCausalLM):
        def __init__(self, config: Any, secret: int) -> None:
            super().__init__(config)

    with pytest.raises(ModelError, match=r"Once cannot be constructed from its own configuration: .*secret"):
        compute_dtypes(Once(CONFIGS["llama"](), 1), torch.float32)


def _limited(**settings: Any) -> int | None:
    with torch.device("meta"):
        return length_limit(transformers.AutoModelForCausalLM.from_config(settings["config"]))


def test_only_longrope_has_a_limit_of_length() -> None:
    assert _limited(config=_phi3()) == 16
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert _limited(config=transformers.LlamaConfig(**_SMALL, rope_scaling=dynamic)) is None
    assert _limited(config=transformers.LlamaConfig(**_SMALL)) is None
    assert _limited(config=CONFIGS["gpt2"]()) is None
