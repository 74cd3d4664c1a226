"""A tiny random model of any causal class of the installed transformers, made from its default configuration.

One rule serves nearly all: every size in the configuration that has a usual name becomes a small number, and per-layer lists
keep one layer of each kind. What the rule cannot know is in ``overrides``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.matrix.overrides import OVERRIDES
from tests.support.models import VOCABULARY, make_tokenizer, save_model

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_LAYERS = 4
_LAYER_NAMES = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "depth",
)
_NAMES_OF_SIZE = {
    VOCABULARY: "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input shape_vocab_size "
    "encoder_hash_byte_group_vocab",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length "
    "attention_hidden_size mamba_d_ssm",
    96: "intermediate_size d_ff d_inner dff dim_ff ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size",
    64: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim lru_width word_embed_proj_dim hidden_size_global",
    48: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size output_embedding_size",
    # as many heads of an indexer as this: with few, all are 0 for many keys, and ties are broken by the padding
    32: "index_n_heads input_embedding_size router_hidden_size attention_head_dim",
    24: "q_lora_rank qk_head_dim",
    16: "head_dim d_head dim_head attention_head_size v_head_dim qk_nope_head_dim kv_lora_rank hidden_size_per_layer_input "
    "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim swa_head_dim kv_channels o_lora_rank "
    "mamba_d_head mamba_head_dim mamba_headdim mamba_d_state state_size ssm_state_size hc_lowrank "
    "sliding_window sliding_window_size attention_window_size window_size local_attention attention_chunk_size rel_extent "
    "chunk_size mamba_chunk_size block_size index_block_size local_attn_chunk_length lsh_attn_chunk_length",
    8: "index_topk qk_rope_head_dim rotary_dim mamba_n_heads n_mamba_heads mamba_num_heads laurel_rank adapter_rank "
    "time_step_rank mamba_dt_rank d_rel loop_gate_rank gated_norm_rank",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_heads "
    "linear_num_value_heads num_query_groups num_experts n_routed_experts num_local_experts moe_num_experts",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k n_groups index_topk_blocks zero_expert_num",
    1: "n_group topk_group num_expert_group",
}
_SIZES = {name: size for size, names in _NAMES_OF_SIZE.items() for name in names.split()}
# Caps of logits, under the names that configurations have for them.
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_UNCAPPED_STD = 3.0
_CAPPED_STD = 0.25  # of the cap: the largest logits are near it


def tiny_config(model_type: str) -> Any:
    """The default configuration of a model type with every size made small."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    return config_class.from_dict(_shrunk(config_class().to_dict()))


def tiny_model(model_type: str) -> Any:
    """A seeded random model in float32 and eval mode, with logits as large as those of a trained model.

    Every weight is random, also those that a class begins with at 0 or 1: an operation whose gain is 0 proves nothing.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type)).float().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        # a table has its values for a reason; what is 0 or 1 everywhere is trained
        if name in saved and buffer.is_floating_point() and (buffer == buffer.flatten()[0]).all():
            buffer.add_(torch.randn_like(buffer), alpha=0.1)
    _scale_head(model)
    return model


def save_tiny(folder: Path, model_type: str) -> Path:
    """``tiny_model`` and a tokenizer in a folder, as users have them; under the configuration of the whole model type."""
    model, config = tiny_model(model_type), tiny_config(model_type)
    save_model(folder, model, make_tokenizer())
    if type(config) is not type(model.config):  # the causal class is a part of what such a checkpoint holds
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    return folder


def soft_cap(config: Any) -> float | None:
    """The cap of the logits that a configuration names."""
    named = {**config.to_dict(), **config.get_text_config().to_dict()}
    return next((float(named[name]) for name in _CAPS if named.get(name)), None)


def before_cap(logit: float, cap: float) -> float:
    """What ``cap * tanh(x / cap)`` made a logit of, as a share of the cap."""
    return math.atanh(min(abs(logit) / cap, 1 - 1e-7))


@torch.inference_mode()
def _scale_head(model: Any) -> None:
    """Scale the output layer until the logits have the wanted spread: of the cap where there is one."""
    head, cap = model.get_output_embeddings(), soft_cap(model.config)
    if getattr(head, "weight", None) is None:
        return
    wanted = _UNCAPPED_STD if cap is None else _CAPPED_STD * cap
    tokens = torch.randint(3, 250, (4, 40))
    for _ in range(40):
        found = float(model(input_ids=tokens, use_cache=False).logits.std())
        if 0.9 * wanted < found < 1.1 * wanted:
            break
        for values in (head.weight, getattr(head, "bias", None)):
            if values is not None:
                values.mul_(min(2.0, max(0.5, wanted / found)))


def _shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with small sizes; the configurations of its parts likewise."""
    depth = next((values[name] for name in _LAYER_NAMES if isinstance(values.get(name), int)), None)
    kept = _kept_layers(values, depth) if depth else []
    small = {name: _shrunk_value(name, value, depth, kept) for name, value in values.items()}
    if values.get("kv_lora_rank"):  # latent attention makes keys for every head, and head_dim is their rotated part
        if "num_attention_heads" in values:
            small["num_key_value_heads"] = small["num_attention_heads"]
        if values.get("head_dim") is not None and values["head_dim"] == values.get("qk_rope_head_dim"):
            small["head_dim"] = small["qk_rope_head_dim"]
    if others := values.get("per_layer_config"):
        small["per_layer_config"] = {
            kept.index(int(layer)): _shrunk(other) for layer, other in others.items() if int(layer) in kept
        }
    return _with(small, OVERRIDES.get(values.get("model_type", ""), {}))


def _with(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes``; the configuration of a part is changed, not replaced."""
    parts = {
        name: {**values[name], **change}
        for name, change in changes.items()
        if isinstance(change, Mapping) and "model_type" in (values.get(name) or {})
    }
    return {**values, **changes, **parts}


def _shrunk_value(name: str, value: Any, depth: int | None, kept: list[int]) -> Any:
    if isinstance(value, Mapping):
        return _shrunk(value) if "model_type" in value else dict(value)
    if isinstance(value, list | tuple):
        return _kept_values(name, value, depth, kept) if depth else value
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name.endswith(("_token_id", "_token_index")):
        return min(value, 1)
    return min(value, len(kept)) if name in _LAYER_NAMES else _SIZES.get(name, value)


def _kept_values(name: str, values: list[Any] | tuple[Any, ...], depth: int, kept: list[int]) -> Any:
    """What a list says of the layers that are kept, if it says something of layers."""
    if _is_layer_numbers(values, depth):
        return [kept.index(layer) for layer in values if layer in kept]
    return [_shrunk_value(name, values[layer], None, []) for layer in kept] if len(values) == depth else values


def _kept_layers(values: Mapping[str, Any], depth: int) -> list[int]:
    """Numbers of the layers to keep: the first one of each kind, and more from the front until there are enough."""
    lists = [value for value in values.values() if isinstance(value, list | tuple)]
    per_layer = [value for value in lists if len(value) == depth and not _is_layer_numbers(value, depth)]
    numbers = [value for value in lists if _is_layer_numbers(value, depth)]
    others = {int(layer): other for layer, other in (values.get("per_layer_config") or {}).items()}
    first_of_kind: dict[str, int] = {}
    for layer in range(depth):
        kind = repr([value[layer] for value in per_layer] + [layer in value for value in numbers] + [others.get(layer)])
        first_of_kind.setdefault(kind, layer)
    kept = list(first_of_kind.values())
    more = [layer for layer in range(depth) if layer not in kept]
    return sorted(kept + more[: max(0, _LAYERS - len(kept))])


def _is_layer_numbers(value: list[Any] | tuple[Any, ...], depth: int) -> bool:
    return bool(value) and all(type(item) is int and item < depth for item in value) and list(value) == sorted(set(value))
