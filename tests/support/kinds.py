"""Configurations of every kind of checkpoint that ``docs/models.md`` lists: multimodal, encoders, encoder-decoders.

Each is small, random and made on the spot. The class that saves it is the one that people's checkpoints name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from tests.support.models import VOCABULARY, make_tokenizer, save_model

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 8,
}
_ENCODER: dict[str, Any] = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"} | {
    "max_position_embeddings": 130
}
_BOTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
}


def _mrope() -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def _qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_scaling": _mrope()}, vision_config=_TOWER | {"fullatt_block_indexes": [0]}
    )


def _qwen3_vl() -> Any:
    vision = _TOWER | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return transformers.Qwen3VLConfig(text_config=_TEXT | {"head_dim": 8, "rope_scaling": _mrope()}, vision_config=vision)


def _mistral3() -> Any:
    text = transformers.MistralConfig(**_TEXT, head_dim=8)
    return transformers.Mistral3Config(
        text_config=text.to_dict(), vision_config=transformers.PixtralVisionConfig(**VISION).to_dict()
    )


def _llava() -> Any:
    text, vision = transformers.LlamaConfig(**_TEXT), transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


def _llama4() -> Any:
    sizes = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    text = {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 32}
    return transformers.Llama4Config(text_config=_TEXT | text, vision_config=VISION | sizes | {"intermediate_size": 64})


def _mllama() -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers.MllamaConfig(
        text_config=_TEXT | {"cross_attention_layers": [1], "rope_scaling": rope}, vision_config=vision
    )


def _gemma3() -> Any:
    text = transformers.Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=16)
    return transformers.Gemma3Config(text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=4)


def _led() -> Any:
    positions = {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128}
    sizes = {key: value for key, value in _BOTH.items() if key != "max_position_embeddings"}
    return transformers.LEDConfig(**sizes, **positions, attention_window=16)


def _prophetnet() -> Any:
    return transformers.ProphetNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        encoder_ffn_dim=32,
        num_encoder_layers=2,
        num_encoder_attention_heads=4,
        decoder_ffn_dim=32,
        num_decoder_layers=1,
        num_decoder_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=1,
    )


def _xlnet() -> Any:
    return transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=1, bos_token_id=0, eos_token_id=1
    )


# name: (class that saves it, configuration)
MULTIMODAL: dict[str, tuple[str, Callable[[], Any]]] = {
    "Qwen2.5-VL": ("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
    "Qwen3-VL": ("Qwen3VLForConditionalGeneration", _qwen3_vl),
    "Mistral 3": ("Mistral3ForConditionalGeneration", _mistral3),
    "LLaVA": ("LlavaForConditionalGeneration", _llava),
    "Llama 4": ("Llama4ForConditionalGeneration", _llama4),
    "Llama 4 (text)": ("Llama4ForCausalLM", lambda: _llama4().text_config),
    "Mllama (Llama 3.2 Vision)": ("MllamaForConditionalGeneration", _mllama),
    "Gemma 3": ("Gemma3ForConditionalGeneration", _gemma3),
}
ENCODER_DECODERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "T5": ("T5ForConditionalGeneration", lambda: transformers.T5Config(**_T5)),
    "UMT5": ("UMT5ForConditionalGeneration", lambda: transformers.UMT5Config(**_T5)),
    "BART": ("BartForConditionalGeneration", lambda: transformers.BartConfig(**_BOTH)),
    "mBART": ("MBartForConditionalGeneration", lambda: transformers.MBartConfig(**_BOTH)),
    "Pegasus": ("PegasusForConditionalGeneration", lambda: transformers.PegasusConfig(**_BOTH)),
    "Marian": ("MarianMTModel", lambda: transformers.MarianConfig(**_BOTH)),
    "M2M-100": ("M2M100ForConditionalGeneration", lambda: transformers.M2M100Config(**_BOTH)),
    "LED": ("LEDForConditionalGeneration", _led),
    "ProphetNet": ("ProphetNetForConditionalGeneration", _prophetnet),
}
# name: (class, configuration, tokens that it takes)
ENCODERS: dict[str, tuple[str, Callable[[], Any], int]] = {
    "T5 encoder": ("T5EncoderModel", lambda: transformers.T5Config(**_T5), 600),
    "BERT": ("BertForMaskedLM", lambda: transformers.BertConfig(**_ENCODER), 130),
    "BERT, classifier": ("BertForSequenceClassification", lambda: transformers.BertConfig(**_ENCODER), 130),
    "RoBERTa": ("RobertaForMaskedLM", lambda: transformers.RobertaConfig(**_ENCODER), 128),
    "MPNet": ("MPNetForMaskedLM", lambda: transformers.MPNetConfig(**_ENCODER), 128),
    "Longformer": ("LongformerForMaskedLM", lambda: transformers.LongformerConfig(**_ENCODER, attention_window=16), 128),
    "ELECTRA": ("ElectraForPreTraining", lambda: transformers.ElectraConfig(**_ENCODER, embedding_size=32), 130),
    "DeBERTa v2": ("DebertaV2ForMaskedLM", lambda: transformers.DebertaV2Config(**_ENCODER), 130),
    "XLNet": ("XLNetLMHeadModel", _xlnet, 600),
    "BigBird": (
        "BigBirdForMaskedLM",
        lambda: transformers.BigBirdConfig(**_ENCODER, block_size=16, num_random_blocks=1, attention_type="block_sparse"),
        112,
    ),
}
# name: (class, configuration, what the refusal says)
REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "Funnel": (
        "FunnelModel",
        lambda: transformers.FunnelConfig(
            vocab_size=VOCABULARY, d_model=32, d_inner=64, n_head=4, d_head=8, block_sizes=[1, 1], num_decoder_layers=1
        ),
        "it pools neighbouring tokens",
    ),
    "Reformer": (
        "ReformerModelWithLMHead",
        lambda: transformers.ReformerConfig(
            vocab_size=VOCABULARY,
            is_decoder=True,
            hidden_size=32,
            attention_head_size=8,
            num_attention_heads=4,
            feed_forward_size=64,
            axial_pos_embds_dim=[16, 16],
            axial_pos_shape=[8, 16],
            max_position_embeddings=128,
        ),
        "draws random hashes",
    ),
    "CPM-Ant": (
        "CpmAntForCausalLM",
        lambda: transformers.CpmAntConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_attention_heads=4,
            dim_head=8,
            dim_ff=64,
            num_hidden_layers=1,
            position_bias_num_buckets=32,
            prompt_length=4,
            prompt_types=4,
            segment_types=4,
        ),
        "looks at padding",
    ),
    "CANINE": (
        "CanineModel",
        lambda: transformers.CanineConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4),
        "does not take tokens of a text",
    ),
    "CLIP": (
        "CLIPModel",
        lambda: transformers.CLIPConfig(text_config=_ENCODER, vision_config=VISION),
        "does not take tokens",
    ),
}


# quantisations whose weights are not turned into plain ones
OTHER_METHODS = ("bitsandbytes", "gptq", "awq", "hqq", "quark", "torchao", "aqlm")
# name: (base of models.CONFIGS, settings of peft.LoraConfig)
_GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rank-stabilised LoRA": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "LoRA of Conv1D layers (GPT-2)": ("gpt2", _GPT2),
    "LoRA of an untied head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA of an untied embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "modules_to_save: head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "modules_to_save: head and embedding": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "modules_to_save: tied head": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "trained biases": ("phi", {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
}
# name: (settings over a tied Llama, what the refusal says)
REFUSED_ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA of a tied head": ({"target_modules": ["lm_head"]}, r"adapts lm_head, whose weight is tied"),
    "LoRA of a tied embedding": ({"target_modules": ["embed_tokens"]}, r"adapts model\.embed_tokens, whose weight is tied"),
    "trained rows of single tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        "trainable_token_indices",
    ),
    "LoRA with lora_bias": ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
}


def make_kind(kind: str, make: Callable[[], Any], folder: Path) -> Any:
    """A random model of a class, saved with a tokenizer; its head is loud enough for rows to differ."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(make()).eval().requires_grad_(False)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        head.weight.normal_(std=0.5)
    save_model(folder, model, make_tokenizer())
    return model


def change_config(folder: Path, **changes: object) -> None:
    """Change entries of a saved model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_8_bits(folder: Path, *, block: int) -> None:
    """Turn the linear layers of a saved model into what DeepSeek and Qwen publish."""
    (path,) = folder.glob("*.safetensors")
    tensors = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        if not re.search(r"_proj\.weight$", name):
            tensors[name] = tensor.to(torch.bfloat16)
            continue
        rows, columns = tensor.shape
        grid = (-(-rows // block), -(-columns // block))
        scales = torch.stack(
            [
                torch.stack(
                    [
                        tensor[r * block : (r + 1) * block, c * block : (c + 1) * block].abs().max() / 448
                        for c in range(grid[1])
                    ]
                )
                for r in range(grid[0])
            ]
        )
        wide = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        tensors[name] = (tensor / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    change_config(folder, quantization_config=settings)


def documented_rows() -> list[tuple[str, str, str]]:
    """Format, outcome on a CPU and outcome on CUDA, for each case of the tests: the table of ``docs/models.md``.

    "simulated" is what is loaded the same way whatever computes, and was not run on a GPU.
    """
    plain = [
        ("safetensors in float32, bfloat16 or float16", "right", "right"),
        ("safetensors of several dtypes", "right", "simulated"),
        ("`pytorch_model.bin`, of tensors only", "right", "simulated"),
        ("8 bits (`fp8`, and `compressed-tensors` as `float-quantized`)", "right, in bfloat16", "simulated"),
        ("MXFP4 (gpt-oss)", "right, in bfloat16", "simulated"),
    ]
    methods = [f"`{method}`" for method in OTHER_METHODS]
    return [
        *plain,
        (f"other quantisations: {', '.join(methods)} and any other", "refused", "refused"),
        ("tensors that no layer takes, or of another shape; Git LFS pointers; files cut off", "refused", "refused"),
        *((f"multimodal, text alone: {name}", "right", "simulated") for name in sorted(MULTIMODAL)),
        *(
            (f"encoder-decoder: {name}", "logits refused, `--space hidden` right", "simulated")
            for name in sorted(ENCODER_DECODERS)
        ),
        *((f"encoder, `--space hidden`: {name}", "right", "simulated") for name in sorted(ENCODERS)),
        *((f"class: {name} ({said})", "refused", "refused") for name, (_, _, said) in sorted(REFUSED.items())),
        *((f"PEFT: {name}", "right", "simulated") for name in sorted(ADAPTERS)),
        *((f"PEFT: {name}", "refused", "refused") for name in sorted(REFUSED_ADAPTERS)),
    ]
