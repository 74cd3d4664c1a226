"""Checkpoints as nanochat writes them, against a float64 forward pass written from its description, and every refusal."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError
from embstore.core.prompts import Prompt
from embstore.integrations.nanochat.checkpoint import NanochatFiles
from embstore.model.locate import locate_model
from tests.support.checkpoints import Evil, State, make_base, tokens_of
from tests.support.models import PROMPTS, distances, open_embedder, rows_before_rounding, unit_mean

CONFIG = {"sequence_len": 128, "vocab_size": 320, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}


def make_state(seed: int = 0, **changes: int) -> State:
    config = CONFIG | changes
    random = torch.Generator().manual_seed(seed)
    width, keys = config["n_embd"], config["n_embd"] // config["n_head"] * config["n_kv_head"]

    def made(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * scale / math.sqrt(columns)

    state = {"transformer.wte.weight": made(config["vocab_size"], width, 5.0)}
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}"
        state |= {f"{name}.attn.c_q.weight": made(width, width), f"{name}.attn.c_k.weight": made(keys, width)}
        state |= {f"{name}.attn.c_v.weight": made(keys, width), f"{name}.attn.c_proj.weight": made(width, width)}
        state |= {f"{name}.mlp.c_fc.weight": made(4 * width, width), f"{name}.mlp.c_proj.weight": made(width, 4 * width)}
    # loud enough for the soft cap to matter
    return state | {"lm_head.weight": made(config["vocab_size"], width, 9.0)}


def _norm(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + np.finfo(np.float32).eps)


def _rotated(heads_HTD: NDArray[np.float64]) -> NDArray[np.float64]:
    _, length, width = heads_HTD.shape
    angle_TD = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, width, 2) / width))
    first, second = heads_HTD[..., : width // 2], heads_HTD[..., width // 2 :]
    cos, sin = np.cos(angle_TD), np.sin(angle_TD)
    return np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


def reference_logits(state: State, ids: list[int]) -> NDArray[np.float64]:
    """Logits float64 [T, V]: norms without weights, rotary before the norm of queries and keys, relu squared, cap 15."""
    weights = {name: tensor.double().numpy() for name, tensor in state.items()}
    heads, groups = CONFIG["n_head"], CONFIG["n_kv_head"]
    x_TD = _norm(weights["transformer.wte.weight"][ids])
    length = len(ids)
    for layer in range(CONFIG["n_layer"]):
        name, h_TD = f"transformer.h.{layer}", _norm(x_TD)

        def split(kind: str, count: int, h_TD: NDArray[np.float64] = h_TD, name: str = name) -> NDArray[np.float64]:
            return (h_TD @ weights[f"{name}.attn.{kind}.weight"].T).reshape(length, count, -1).transpose(1, 0, 2)

        query, key = _norm(_rotated(split("c_q", heads))), _norm(_rotated(split("c_k", groups)))
        key, value = (np.repeat(each, heads // groups, axis=0) for each in (key, split("c_v", groups)))
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        scores[:, np.triu(np.ones((length, length), dtype=bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (shares / shares.sum(axis=-1, keepdims=True)) @ value
        x_TD = x_TD + mixed.transpose(1, 0, 2).reshape(length, -1) @ weights[f"{name}.attn.c_proj.weight"].T
        inner = np.maximum(_norm(x_TD) @ weights[f"{name}.mlp.c_fc.weight"].T, 0) ** 2
        x_TD = x_TD + inner @ weights[f"{name}.mlp.c_proj.weight"].T
    return 15 * np.tanh(_norm(x_TD) @ weights["lm_head.weight"].T / 15)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "nanochat"))
    monkeypatch.setitem(sys.modules, "nanochat", None)  # whatever this machine has is not installed here
    return tmp_path / "nanochat"


def _located(model: str, **settings: Any) -> NanochatFiles:
    files = locate_model(EmbeddingConfig(model=model, **settings))
    assert isinstance(files, NanochatFiles)
    return files


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_those_of_nanochats_own_forward_pass(compiled: bool, base: Path, tmp_path: Path) -> None:
    state = make_state()
    saved = {f"_orig_mod.{name}": tensor for name, tensor in state.items()} if compiled else state
    make_base(base, CONFIG, saved)
    embedder = open_embedder(Path("nanochat:base"), PROMPTS, tmp_path / "work", trust_tokenizer_pickle=True)
    assert embedder.spec.head.kind == "capped"
    assert [list(row.ids_T) for row in embedder.tokens(PROMPTS)] == [tokens_of(prompt.text or "") for prompt in PROMPTS]
    # <|bos|> conditions every token and is not pooled
    logits = [reference_logits(state, tokens_of(prompt.text or ""))[1:] for prompt in PROMPTS]
    assert np.concatenate(logits).std() > 5
    expected_NV = np.stack([unit_mean(logits_TV) for logits_TV in logits])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_NV).max() <= 5e-6


def test_bfloat16_weights_are_taken_as_they_are(base: Path, tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in make_state().items()}
    make_base(base, CONFIG, state, source="chatsft_checkpoints")
    embedder = open_embedder(Path("nanochat:sft"), PROMPTS[:4], tmp_path / "work", trust_tokenizer_pickle=True)
    logits = [reference_logits(state, tokens_of(prompt.text or ""))[1:] for prompt in PROMPTS[:4]]
    expected_NV = np.stack([unit_mean(logits_TV) for logits_TV in logits])
    assert distances(rows_before_rounding(embedder, PROMPTS[:4]), expected_NV).max() <= 5e-6


def test_rows_that_only_pad_the_vocabulary_are_left_out(base: Path, tmp_path: Path) -> None:
    state = make_state()  # 320 rows, a multiple of 64
    make_base(base, CONFIG | {"vocab_size": 290}, state)
    embedder = open_embedder(Path("nanochat:base"), PROMPTS[:4], tmp_path / "work", trust_tokenizer_pickle=True)
    assert (embedder.spec.head.kind, embedder.spec.dimension) == ("capped", 290)
    logits = [reference_logits(state, tokens_of(prompt.text or ""))[1:, :290] for prompt in PROMPTS[:4]]
    expected_NV = np.stack([unit_mean(logits_TV) for logits_TV in logits])
    assert distances(rows_before_rounding(embedder, PROMPTS[:4]), expected_NV).max() <= 5e-6


def test_a_conversation_is_rendered_with_nanochats_turn_tokens(base: Path, tmp_path: Path) -> None:
    make_base(base, CONFIG, make_state())
    embedder = open_embedder(Path("nanochat:base"), PROMPTS, tmp_path / "work", trust_tokenizer_pickle=True)
    messages = ({"role": "user", "content": "the"}, {"role": "assistant", "content": "a"})
    (row,) = embedder.tokens([Prompt(id=None, messages=messages)])
    assert list(row.ids_T) == [258, 259, 257, 260, 261, ord("a"), 262]
    assert list(row.pooled_T) == [False, False, True, False, False, True, False]


def test_the_deepest_tag_and_the_last_step_are_taken_unless_named(base: Path) -> None:
    make_base(base, CONFIG, make_state(), tag="d4", step=7)
    make_base(base, CONFIG, make_state(1), tag="d12", step=50)
    folder = base / "base_checkpoints" / "d12"
    for name in ("model_000050.pt", "meta_000050.json"):
        (folder / name.replace("000050", "000100")).write_bytes((folder / name).read_bytes())
    assert _located("nanochat:base").name == "nanochat:base:d12:100"
    assert _located("nanochat:base:d4").name == "nanochat:base:d4:7"
    assert _located("nanochat:base:d12:50").weights.name == "model_000050.pt"
    identities = {_located(f"nanochat:base:{which}").identity().weights_sha256 for which in ("d4", "d12")}
    assert len(identities) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nanochat:pretrained", "has the sources base, mid, sft, rl"),
        ("nanochat:rl", "chatrl_checkpoints does not contain checkpoint folders"),
        ("nanochat:base:d99", "does not contain checkpoint d99; it contains: d2"),
        ("nanochat:base:d2:5", "does not contain step 5; the last are: 100"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(given: str, message: str, base: Path) -> None:
    make_base(base, CONFIG, make_state())
    with pytest.raises(ModelError, match=message):
        _located(given)


def test_a_pickled_tokenizer_is_not_opened_unasked(base: Path) -> None:
    make_base(base, CONFIG, make_state())
    with pytest.raises(ModelError, match=r"tokenizer\.pkl is a pickle") as caught:
        _located("nanochat:base").load("logits")
    assert "--trust-tokenizer-pickle" in str(caught.value.hint)
    assert "tokenizer.json" in str(caught.value.hint)


def test_a_tokenizer_file_that_is_no_pickle_comes_first(base: Path, tmp_path: Path) -> None:
    make_base(base, CONFIG, make_state())
    files = _located("nanochat:base", trust_tokenizer_pickle=True)  # as docs/models.md says
    files.load_tokenizer().backend_tokenizer.save(str(files.tokenizer.with_name("tokenizer.json")))
    again = open_embedder(Path("nanochat:base"), PROMPTS, tmp_path / "work")
    assert [list(row.ids_T) for row in again.tokens(PROMPTS)] == [tokens_of(prompt.text or "") for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resid_lambdas": torch.ones(2)}, "tensor resid_lambdas, which transformers' NanoChat class does not know"),
        ({"lm_head.weight": None}, r"tensor lm_head\.weight, which is missing"),
    ],
)
def test_a_checkpoint_of_another_generation_is_refused_by_name(
    change: dict[str, torch.Tensor | None], message: str, base: Path
) -> None:
    state = {name: tensor for name, tensor in (make_state() | change).items() if tensor is not None}
    make_base(base, CONFIG, state)
    with pytest.raises(ModelError, match=message):
        _located("nanochat:base", trust_tokenizer_pickle=True).load("logits")


def test_a_setting_that_the_class_does_not_know_is_refused(base: Path) -> None:
    meta = make_base(base, CONFIG, make_state()) / "meta_000100.json"
    meta.write_text(json.dumps({"model_config": CONFIG | {"window_pattern": "SSL"}}))
    with pytest.raises(ModelError, match="setting window_pattern"):
        _located("nanochat:base").identity()


def test_no_code_in_a_weight_file_runs(base: Path, tmp_path: Path) -> None:
    folder = make_base(base, CONFIG, make_state())
    torch.save({"transformer.wte.weight": Evil(tmp_path / "ran")}, folder / "model_000100.pt")
    with pytest.raises(ModelError, match="cannot be read"):
        _located("nanochat:base", trust_tokenizer_pickle=True).load("logits")
    assert not (tmp_path / "ran").exists()
