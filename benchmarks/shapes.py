"""Checkpoints of the shapes that people post-train, with random bfloat16 weights: for memory, time and bytes, not quality.

Shapes are those of the published configurations of the models they are named after.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

_SHARD_BYTES = 1 << 30
_SCALE = 0.02
_QWEN_COLUMNS, _LLAMA_COLUMNS = 151936, 128256


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A configuration class of transformers and its sizes."""

    config: str
    sizes: dict[str, Any]


def _shape(
    config: str, *, width: int, inner: int, layers: int, heads: int, kv_heads: int, columns: int, tied: bool, **more: int
) -> Shape:
    sizes = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": columns,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
    }
    return Shape(config=config, sizes=sizes | more)


SHAPES = {
    "0.5B": _shape("Qwen2Config", width=896, inner=4864, layers=24, heads=14, kv_heads=2, columns=_QWEN_COLUMNS, tied=True),
    "1.7B": _shape(
        "Qwen3Config",
        width=2048,
        inner=6144,
        layers=28,
        heads=16,
        kv_heads=8,
        columns=_QWEN_COLUMNS,
        tied=True,
        head_dim=128,
    ),
    "8B": _shape(
        "LlamaConfig", width=4096, inner=14336, layers=32, heads=32, kv_heads=8, columns=_LLAMA_COLUMNS, tied=False
    ),
}


def make(name: str, tokenizer: Path, folder: Path) -> Path:
    """A checkpoint of shape ``name`` in ``folder/name``, with this tokenizer; one that is there already is kept."""
    out, shape = folder / name, SHAPES[name]
    if (out / "config.json").is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    config = getattr(transformers, shape.config)(**shape.sizes, dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    wanted = {key: each for key, each in model.state_dict().items() if key not in tied}
    index: dict[str, str] = {}
    for number, shard in enumerate(_shards(wanted)):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    size = sum(2 * each.numel() for each in wanted.values())
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / file).is_file():
            shutil.copy(tokenizer / file, out)
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)  # last: a folder with a configuration is whole
    return out


def _shards(wanted: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Random tensors of these shapes, about 1 GiB at a time."""
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Tensor] = {}
    for key, like in wanted.items():
        tensor = torch.empty(like.shape, dtype=torch.bfloat16)
        shard[key] = tensor.fill_(1) if key.endswith("norm.weight") else tensor.normal_(0, _SCALE, generator=generator)
        if sum(2 * each.numel() for each in shard.values()) >= _SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard
