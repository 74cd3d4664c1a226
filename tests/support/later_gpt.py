"""A model with the interface of nanochat's ``gpt.py`` and what later generations have, as small as it can be: our own code.

Value embeddings with gates, sliding windows, residual scales, a mid-layer residual taken out, a padded vocabulary, a compute
dtype that is a global. ``write_package`` makes an importable ``nanochat`` of this file; here it is the oracle, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COMPUTE_DTYPE = torch.float32
SOFT_CAP = 15.0

# As in nanochat: what an import of it does to the process around it, and the dtype it takes from there.
_COMMON = """
import logging
import os

import torch

logging.basicConfig(level=logging.INFO)
COMPUTE_DTYPE = getattr(torch, os.environ.get("NANOCHAT_DTYPE", "bfloat16"))
"""


@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, has_values: bool) -> None:
        super().__init__()
        self.shape = (config.n_head, config.n_kv_head, config.n_embd // config.n_head)
        width = config.n_embd // config.n_head * config.n_kv_head
        self.c_q, self.c_proj = (Linear(config.n_embd, config.n_embd, bias=False) for _ in range(2))
        self.c_k, self.c_v = (Linear(config.n_embd, width, bias=False) for _ in range(2))
        self.ve_gate = Linear(8, config.n_kv_head, bias=False) if has_values else None

    def forward(self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, window: int) -> Tensor:
        heads, groups, width = self.shape
        batch, length = x.shape[:2]
        q, k, v = (each(x).view(batch, length, -1, width) for each in (self.c_q, self.c_k, self.c_v))
        if values is not None and self.ve_gate is not None:
            v = v + 3 * torch.sigmoid(self.ve_gate(x[..., :8])).unsqueeze(-1) * values.view(batch, length, groups, width)
        q, k = (1.2 * norm(_rotated(each, cos, sin)) for each in (q, k))
        k, v = (each.repeat_interleave(heads // groups, dim=2) for each in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width)
        behind = torch.arange(length)[:, None] - torch.arange(length)[None]
        shares = scores.masked_fill((behind < 0) | (behind > window), -math.inf).softmax(-1)
        return self.c_proj(torch.einsum("bhqk,bkhd->bqhd", shares, v).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x).relu().square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, has_values: bool) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config, has_values), MLP(config)

    def forward(self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, window: int) -> Tensor:
        x = x + self.attn(norm(x), values, cos, sin, window)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // 64) * 64
        if rows != config.vocab_size:
            print(f"vocabulary of {config.vocab_size} padded to {rows}")
        with_values = [layer for layer in range(config.n_layer) if layer % 2 == (config.n_layer - 1) % 2]
        blocks = [Block(config, layer in with_values) for layer in range(config.n_layer)]
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, config.n_embd), "h": nn.ModuleList(blocks)})
        self.lm_head = Linear(config.n_embd, rows, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        width = config.n_embd // config.n_head * config.n_kv_head
        self.value_embeds = nn.ModuleDict({str(layer): nn.Embedding(rows, width) for layer in with_values})
        for name, table in zip(("cos", "sin"), self.tables(), strict=True):
            self.register_buffer(name, table, persistent=False)

    def tables(self) -> tuple[Tensor, Tensor]:
        width = self.config.n_embd // self.config.n_head
        device = self.lm_head.weight.device
        rates = 100000.0 ** (-torch.arange(0, width, 2, device=device) / width)
        angles = torch.outer(torch.arange(10.0 * self.config.sequence_len, device=device), rates)[:, None]
        return angles.cos().to(COMPUTE_DTYPE), angles.sin().to(COMPUTE_DTYPE)

    @torch.no_grad()
    def init_weights(self) -> None:
        for parameter in self.parameters():
            parameter.normal_()
        self.cos, self.sin = self.tables()
        self.transformer["wte"].to(COMPUTE_DTYPE)

    def forward(self, idx: Tensor, targets: Tensor | None = None, kv_cache: Any = None) -> Tensor:
        length = idx.shape[1]
        assert length > 1
        assert self.cos.dtype == COMPUTE_DTYPE
        cos, sin = self.cos[:length], self.sin[:length]
        x = norm(self.transformer["wte"](idx).to(COMPUTE_DTYPE))
        middle = x
        pattern = self.config.window_pattern
        for layer, block in enumerate(self.transformer["h"]):
            is_last = layer == self.config.n_layer - 1
            window = self.config.sequence_len // (4 if pattern[layer % len(pattern)] == "S" and not is_last else 1)
            values = self.value_embeds[str(layer)](idx).to(x.dtype) if str(layer) in self.value_embeds else None
            x = block(self.resid_lambdas[layer] * x, values, cos, sin, window)
            if layer == self.config.n_layer // 2:
                middle = x
        logits = self.lm_head(norm(x - self.backout_lambda.to(x.dtype) * middle))[..., : self.config.vocab_size]
        logits = logits if COMPUTE_DTYPE is torch.float64 else logits.float()
        return SOFT_CAP * torch.tanh(logits / SOFT_CAP)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def write_package(folder: Path, *more: str) -> Path:
    """A folder for ``sys.path`` with a package ``nanochat`` in it; ``more`` lines end its ``gpt.py``."""
    package = folder / "nanochat"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "common.py").write_text(_COMMON)
    lines = [Path(__file__).read_text(encoding="utf-8"), "from nanochat.common import COMPUTE_DTYPE", *more]
    (package / "gpt.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
