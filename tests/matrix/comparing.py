"""Rows that embstore makes of a tiny model, against the logits of the model's own class, one prompt at a time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from embstore.model.embed import LogitEmbedder
from tests.matrix.tiny import save_tiny
from tests.support.models import PROMPTS, distances, make_tokenizer, open_embedder, rows_before_rounding, unit_mean

# How far batch mates may move a float32 row (docs/promises.md).
PROMISED_L2 = 2e-6
# Where rounding is amplified, by recurrences mostly, the class's own float32 logits are as far from float64, or farther.
_MOST_L2 = 5e-5
_THREADS, _BATCH_TOKENS = 2, 64  # a dozen batches of other lengths, two at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What became of a model type, in the words of ``record.Expected``; ``worst`` is the distance of the worst row."""

    how: str
    head: str = ""
    raises: str = ""
    message: str = ""
    worst: float = 0.0
    std: float = 0.0  # of the class's logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle:
    """Mean logits of the class itself, unit length float64 [N, V], and the spread and the largest of all logits."""

    rows_NV: NDArray[np.float64]
    std: float
    largest: float


def tokens_of_prompts() -> list[list[int]]:
    """Token ids of PROMPTS: 4 to 57 of each."""
    tokenizer = make_tokenizer()
    return [tokenizer(prompt.text).input_ids for prompt in PROMPTS]


def load_class(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model by transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def ask_class(model: Any) -> Oracle:
    """Each prompt alone: a batch of one, nothing padded."""
    rows, spread, largest = [], [], 0.0
    for ids in tokens_of_prompts():
        tokens_1T = torch.tensor([ids])
        logits_TV = model(input_ids=tokens_1T, attention_mask=torch.ones_like(tokens_1T), use_cache=False).logits[0]
        rows.append(unit_mean(logits_TV.double().numpy()))
        spread.append(float(logits_TV.std()))
        largest = max(largest, float(logits_TV.abs().max()))
    return Oracle(rows_NV=np.stack(rows), std=float(np.mean(spread)), largest=largest)


def compare(model_type: str, work: Path) -> Found:
    """Make the model, ask its class, embed the same prompts by embstore, and compare."""
    with one_thread():
        try:
            folder = save_tiny(work / "model", model_type)
            model = load_class(folder)
            oracle = ask_class(model)
        except Exception as error:  # noqa: BLE001 - any class's constructor and forward run here
            return Found(how="impossible", **_told(error))
        try:
            embedder = open_tiny(folder, work)
            rows_NV = rows_before_rounding(embedder, PROMPTS)
        except Exception as error:  # noqa: BLE001 - as above
            return Found(how="refused", **_told(error), std=oracle.std)
        worst = float(distances(rows_NV, oracle.rows_NV).max())
        is_right = worst <= PROMISED_L2 or worst <= min(2 * rounding_of(model, oracle), _MOST_L2)
        return Found(how="right" if is_right else "wrong", head=embedder.spec.head.kind, worst=worst, std=oracle.std)


def open_tiny(folder: Path, work: Path, dtype: str = "float32") -> LogitEmbedder:
    """An embedder with two threads and small batches."""
    settings = {"threads": _THREADS, "batch_tokens": _BATCH_TOKENS, "dtype": dtype}
    return open_embedder(folder, PROMPTS, work / "embedder", **settings)


def rounding_of(model: Any, oracle: Oracle) -> float:
    """How far the class's own float32 rows are from its float64 rows; 0 where it cannot compute in float64."""
    double = copy.deepcopy(model).double()
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")  # grouped products of experts have no float64
    try:
        return float(distances(oracle.rows_NV, ask_class(double).rows_NV).max())
    except RuntimeError:  # kernels that exist in float32 only
        return 0.0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Products in one thread, also in embstore's probes: busy cores wait for a second one for longer than it computes.

    Batches still run two at a time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch("torch.set_num_threads"):
        yield
    torch.set_num_threads(before)


def _told(error: Exception) -> dict[str, str]:
    return {"raises": type(error).__name__, "message": " ".join(str(error).split())}
