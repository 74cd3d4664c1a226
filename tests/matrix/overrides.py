"""What the rule of ``tiny`` cannot know, by model type: also that of a part, wherever it occurs in a configuration."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING = ["sliding_attention", "full_attention"] * 2

OVERRIDES: dict[str, dict[str, Any]] = {
    # The default leaves a size open, and the class cannot be made without it.
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    # The default is an encoder: the class is causal only with this switch.
    "big_bird": {"is_decoder": True},
    # Sizes that must fit each other in a way of this class alone.
    "dory": {"layer_types": _SLIDING, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots3_note_text": {
        "head_dim": 32,
        "per_layer_config": {
            layer: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 24, "qk_nope_head_dim": 24}
            for layer in (2, 3)
        },
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64, "head_dim": 16},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48]},
    "rwkv": {"attention_hidden_size": 64, "rescale_every": 2},
    "xlstm": {"qk_dim_factor": 1.0},
    "zaya": {"num_experts_per_tok": 1},
    # Kinds of layers that so few would leave out: attention, experts, keys of another layer, blocks that layers share.
    "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {
        "layer_types": _SLIDING,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0] * 2,
        "intermediate_size": [96] * 4,
    },
    "gemma4_text": {
        "layer_types": _SLIDING,
        "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
        "num_kv_shared_layers": 2,
        "final_logit_softcapping": 30.0,  # as the published models have it
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen4_exp_text": {
        "eos_token_id": 1,
        "indexer_n_heads": 32,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [2],
        "ple_embed_dim": 64,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    # The class drops the least of more keys than this. Equal tokens tie there, and padding decides which of them goes.
    "doge": {"keep_window_size": 128},
}
