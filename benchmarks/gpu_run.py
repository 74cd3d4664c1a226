"""What the parts of ``benchmarks.gpu`` share: the run with its results, and a model with its prompts.

Shapes: N prompts, T tokens.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.methods import MAX_TOKENS, attention_flops, texts_of
from embstore.core.config import BuildConfig
from embstore.core.prompts import Prompt
from embstore.model.embed import LogitEmbedder
from embstore.model.source import TorchSource

DEVICE = "cuda"
PEAK_BF16_FLOPS = 989e12  # NVIDIA's datasheet for the H100 SXM and H200, dense
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A loaded and probed embedder, and how long that took."""

    source: TorchSource
    embedder: LogitEmbedder
    config: BuildConfig
    create_seconds: float


class Run:
    """Options, the results so far, and what parts share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: Figures = json.loads(options.results.read_text()) if options.results.exists() else {}
        self.opened: dict[str, Opened] = {}  # embedders that another part uses too, one model at a time

    def record(self, path: Sequence[str], figures: Figures) -> None:
        """Keep a part's figures, with what they were measured on."""
        at = self.results
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = figures | {"date": time.strftime("%Y-%m-%d")}
        packages = ("torch", "transformers", "numpy", "numcodecs")
        self.results["versions"] = {name: importlib.metadata.version(name) for name in packages}
        self.results["versions"] |= {"python": sys.version.split()[0], "cuda": torch.version.cuda}
        self.results["command"] = "python -m benchmarks.gpu --prompts FILE --model FOLDER"
        self.options.results.parent.mkdir(parents=True, exist_ok=True)
        self.options.results.write_text(json.dumps(self.results, indent=1) + "\n")

    def utilisation(self, flops: float) -> Figures:
        """Shares of a large bfloat16 product's rate, measured and the datasheet's; the latter where none was measured."""
        measured = float(self.results.get("machine", {}).get("bfloat16_flops", PEAK_BF16_FLOPS))
        return {"mfu_of_measured": flops / measured, "mfu_of_datasheet": flops / PEAK_BF16_FLOPS}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model folder, its prompts, and how many rows the parts take."""

    name: str
    folder: Path
    texts: list[str]
    swept_rows: int
    original_rows: int
    config: Any
    lengths_N: NDArray[np.int64] = field(repr=False)  # tokens of each prompt
    tokens_NT: torch.Tensor = field(repr=False)  # padded, on the device

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """As the embedder takes them."""
        return [Prompt(id=None, text=text) for text in self.texts]

    def flops(self, backbone_parameters: int, rows: Sequence[int] | None = None, *, head: bool) -> float:
        """Of real tokens: 2 a parameter, the causal half of attention, and with ``head`` one V-wide product a row."""
        lengths_N = (self.lengths_N if rows is None else self.lengths_N[list(rows)]).astype(np.float64)
        wide = 2.0 * len(lengths_N) * self.config.hidden_size * self.config.vocab_size if head else 0.0
        return 2 * backbone_parameters * float(lengths_N.sum()) + attention_flops(self.config, lengths_N) + wide


def subject_of(run: Run, name: str) -> Subject:
    """The model given, or the large one, which is made where it is missing; recorded with its size."""
    options = run.options
    folder = options.model if name == "given" else _large_model(options)
    rows = options.rows if name == "given" else options.large_rows
    texts = texts_of({"prompts": str(options.prompts), "rows": rows})
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    lengths_N = np.array([len(ids) for ids in tokens])
    tokens_NT = np.zeros((len(tokens), lengths_N.max()), dtype=np.int64)
    tokens_NT[np.arange(lengths_N.max()) < lengths_N[:, None]] = np.concatenate(tokens)
    subject = Subject(
        name=name,
        folder=folder,
        texts=texts,
        swept_rows=len(texts) if name == "given" else min(len(texts), 2048),
        original_rows=1024 if name == "given" else 256,
        config=transformers.AutoConfig.from_pretrained(folder),
        lengths_N=lengths_N,
        tokens_NT=torch.from_numpy(tokens_NT).to(DEVICE),
    )
    config = subject.config
    described = {
        "name": folder.name if name == "given" else "random Llama",
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "rows": len(texts),
        "tokens": int(subject.lengths_N.sum()),
    }
    run.record(["models", name, "model"], described)
    return subject


def _large_model(options: argparse.Namespace) -> Path:
    """A Llama with the shape of a current 1B model, random weights, and the given model's tokenizer."""
    folder: Path = options.work / "large-model"
    if (folder / "config.json").exists():
        return folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
