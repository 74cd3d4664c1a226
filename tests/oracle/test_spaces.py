"""``--space`` and ``--pooling`` against float64 states and logits of one unpadded prompt at a time; threads move no byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from embstore.core.errors import ConfigError
from tests.support.models import (
    PROMPTS,
    VOCABULARY,
    distances,
    embed,
    make_model,
    make_tokenizer,
    open_embedder,
    oracle_logits,
    reopened,
    rows_before_rounding,
    save_model,
    unit_mean,
)


def _encoder(name: str) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "bert": lambda: transformers.BertConfig(**common, intermediate_size=64, pad_token_id=1),
        "modernbert": lambda: transformers.ModernBertConfig(
            **common, intermediate_size=64, local_attention=8, pad_token_id=1, bos_token_id=0, eos_token_id=1,
            cls_token_id=0, sep_token_id=1,
        ),
    }[name]()  # fmt: skip
    # saved with its own head: the states are found in a checkpoint that has more, and no pooler
    return transformers.AutoModelForMaskedLM.from_config(config).eval().requires_grad_(False)


def _states(folder: Path) -> list[NDArray[np.float64]]:
    """Final hidden states float64 [T, D] of each prompt."""
    double = transformers.AutoModel.from_pretrained(folder).eval().double()
    tokenizer = make_tokenizer()
    with torch.inference_mode():
        return [
            double(input_ids=torch.tensor([tokenizer(prompt.text).input_ids])).last_hidden_state[0].numpy()
            for prompt in PROMPTS
        ]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-h1", "bert", "modernbert"])
def test_hidden_rows_are_pooled_float64_states(name: str, pooling: str, tmp_path: Path) -> None:
    model = _encoder(name) if "bert" in name else make_model(name)
    folder = save_model(tmp_path / "model", model, make_tokenizer())
    embedder = open_embedder(folder, PROMPTS, tmp_path / "work", space="hidden", pooling=pooling)
    assert (embedder.spec.head.kind, embedder.spec.columns, embedder.spec.dimension) == ("none", "hidden", 32)
    states = _states(folder)
    expected_ND = np.stack([unit_mean(state_TD if pooling == "mean" else state_TD[-1:]) for state_TD in states])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_ND).max() <= 5e-6
    # coordinates keep every distance, and a resume goes on with the same rows
    blocks = embed(embedder, PROMPTS)
    coord_NR = np.concatenate([block.coord_BR for block in blocks]).astype(np.float64)
    found, expected = (np.linalg.norm(rows[:, None] - rows[None], axis=2) for rows in (coord_NR, expected_ND))
    assert np.abs(found - expected).max() <= 5e-6
    again = embed(reopened(folder, embedder), PROMPTS)
    assert all(np.array_equal(left.emb_BV, right.emb_BV) for left, right in zip(blocks, again, strict=True))


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "modernbert-decoder"])
def test_the_last_token_alone_gives_its_logits(name: str, tmp_path: Path) -> None:
    model, tokenizer = make_model(name), make_tokenizer()
    embedder = open_embedder(save_model(tmp_path / "model", model, tokenizer), PROMPTS, tmp_path / "work", pooling="last")
    logits = oracle_logits(model, [tokenizer(prompt.text).input_ids for prompt in PROMPTS])
    expected_NV = np.stack([unit_mean(logits_TV[-1:]) for logits_TV in logits])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_NV).max() <= 5e-6


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_number_of_worker_threads_moves_no_byte(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", make_model(name), make_tokenizer())
    rows = []
    for threads in (1, 2, 3):
        embedder = open_embedder(folder, PROMPTS, tmp_path / "work", threads=threads, batch_tokens=64)
        assert embedder.num_workers == threads
        rows.append(np.concatenate([block.emb_BV for block in embed(embedder, PROMPTS)]))
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])


def test_hidden_states_have_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab tokenizer chooses columns of logits"):
        open_embedder(tmp_path, PROMPTS, tmp_path / "work", space="hidden", vocab="tokenizer")
