"""Prompts of one token: every class, alone and among others, also where the class refuses a single token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from numpy.typing import NDArray

from embstore.core.prompts import Prompt
from tests.oracle.test_embed import CLASSES
from tests.support.models import (
    PROMPTS,
    Case,
    distances,
    embed,
    make_model,
    make_tokenizer,
    open_embedder,
    oracle_logits,
    rows_before_rounding,
    save_model,
    unit_mean,
)

SINGLE = [Prompt(id=None, text=text) for text in "abcxyz"]


def expected_rows(model: Any) -> NDArray[np.float64]:
    tokens = [make_tokenizer()(prompt.text).input_ids for prompt in SINGLE]
    assert all(len(ids) == 1 for ids in tokens)
    return np.stack([unit_mean(logits_TV) for logits_TV in oracle_logits(model, tokens)])


@pytest.mark.parametrize("name", CLASSES)
def test_single_tokens_are_their_own_logits(case_of: Callable[[str], Case], name: str, tmp_path: Path) -> None:
    case = case_of(name)
    expected_NV = expected_rows(case.model)
    # an embedder that was made of nothing else, and one among longer prompts
    alone = open_embedder(case.folder, SINGLE, tmp_path)
    assert alone.spec.head.kind == case.embedder.spec.head.kind
    assert distances(rows_before_rounding(alone, SINGLE), expected_NV).max() <= 5e-6
    together_NV = rows_before_rounding(case.embedder, [*PROMPTS, *SINGLE])[len(PROMPTS) :]
    assert distances(together_NV, expected_NV).max() <= 5e-6


@pytest.mark.parametrize(
    ("name", "refusing"),
    [
        ("llama", transformers.LlamaModel),
        ("llama", transformers.LlamaForCausalLM),
        ("nanochat", transformers.NanoChatForCausalLM),
        ("modernbert-decoder", transformers.ModernBertDecoderModel),
        ("modernbert-decoder", transformers.ModernBertDecoderForCausalLM),
    ],
)
def test_a_class_that_refuses_a_single_token_is_never_given_one(
    name: str, refusing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(name)
    expected_NV = expected_rows(model)
    genuine = refusing.forward

    def forward(self: Any, input_ids: Any = None, **more: Any) -> Any:
        if input_ids.shape[1] == 1:
            raise ValueError("sequences of one token are steps of generation")
        return genuine(self, input_ids=input_ids, **more)

    monkeypatch.setattr(refusing, "forward", forward)
    folder = save_model(tmp_path / "model", model, make_tokenizer())
    embedder = open_embedder(folder, SINGLE, tmp_path / "work", batch_tokens=2)
    assert distances(rows_before_rounding(embedder, SINGLE), expected_NV).max() <= 5e-6
    assert sum(len(block.emb_BV) for block in embed(embedder, SINGLE)) == len(SINGLE)
