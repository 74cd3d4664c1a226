"""Rows of real model classes against the mean of their full logits in float64, and what may not move a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError
from embstore.core.events import Event, Notice
from embstore.core.interfaces import no_check
from embstore.core.prompts import Prompt
from embstore.core.spec import Head
from embstore.model.locate import locate_model
from embstore.model.packed import can_pack
from embstore.model.source import TorchSource
from embstore.model.tokens import TokenRow
from tests.support.models import (
    PROMPTS,
    VOCABULARY,
    Case,
    PromptList,
    distances,
    embed,
    make_case,
    make_model,
    make_tokenizer,
    open_embedder,
    oracle_logits,
    reopened,
    rows_before_rounding,
    save_model,
    unit_mean,
)

_UNSCALED = ("llama", "llama-tied", "qwen3", "mistral", "phi3", "gpt2", "gpt-neox", "bloom", "opt", "mamba")
_BIASED = ("phi", "gptj")
_EXPERTS = ("mixtral", "olmoe", "deepseek-v3")
AFFINE_SCALES = dict.fromkeys(_UNSCALED + _BIASED + _EXPERTS, 1.0) | {
    "granite": 1 / 3,
    "granite-moe": 1 / 3,
    "cohere": 0.25,
    "cohere2": 0.25,
    "falcon-h1": 0.5,
}
CAPPED = ("gemma2", "gemma3n", "nanochat")
NETWORK = ("modernbert-decoder", "opt-projected")
CLASSES = [*AFFINE_SCALES, *CAPPED, *NETWORK]
# Rows of these share one direction (a bias), as rows of trained models do; others spread ten times as far, and so do errors.
BIASED = ("phi", "modernbert-decoder")

CaseOf = Callable[[str], Case]


@pytest.mark.parametrize("name", CLASSES)
def test_rows_are_the_float64_mean_of_full_logits(case_of: CaseOf, name: str) -> None:
    case = case_of(name)
    assert np.concatenate(case.logits).std() >= 5
    expected_NV = np.stack([unit_mean(logits_TV) for logits_TV in case.logits])
    assert distances(case.rows_NV, expected_NV).max() <= 5e-6


@pytest.mark.parametrize(("name", "scale"), AFFINE_SCALES.items())
def test_a_linear_head_is_pooled_before(case_of: CaseOf, name: str, scale: float) -> None:
    spec = case_of(name).embedder.spec
    assert spec.head.kind == "affine"
    assert spec.head.scale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("name", [*CAPPED, *NETWORK])
def test_a_capped_head_is_fused_and_any_other_streamed(case_of: CaseOf, name: str) -> None:
    spec = case_of(name).embedder.spec
    assert spec.head == Head(kind="capped" if name in CAPPED else "streamed")
    assert spec.basis == "range-finder"
    assert spec.rank <= 33


def test_a_store_that_pooled_behind_a_network_is_not_continued(case_of: CaseOf) -> None:
    """The releases until November 2026 did that; rows of this one would differ in low bits, in another basis."""
    case = case_of("modernbert-decoder")
    with pytest.raises(ModelError, match="pools after a network in front of the output layer") as caught:
        reopened(case.folder, case.embedder, head=Head(kind="network"))
    assert "embstore build PROMPTS --model MODEL" in str(caught.value.hint)


def test_a_store_that_pooled_behind_a_network_is_not_reused(case_of: CaseOf) -> None:
    case = case_of("modernbert-decoder")
    old = dataclasses.replace(case.embedder.spec, head=Head(kind="network"))
    source = TorchSource(locate_model(EmbeddingConfig(model=str(case.folder))))
    with pytest.raises(ModelError, match="pools after a network") as caught:
        source.take_over(PromptList(PROMPTS), old, case.embedder.basis_VR, memory_bytes=1 << 30)
    assert caught.value.hint == "build without --reuse"


def test_a_head_that_nothing_describes_is_streamed_by_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = transformers.LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        output = genuine(self, *args, **more)
        output.logits = 9 * torch.tanh(output.logits / 9)  # a cap that no configuration names
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    case = make_case("llama", tmp_path)
    assert case.embedder.spec.head.kind == "streamed"
    expected_NV = np.stack([unit_mean(logits_TV) for logits_TV in case.logits])
    assert distances(case.rows_NV, expected_NV).max() <= 5e-6
    stored = [block.emb_BV for block in embed(reopened(case.folder, case.embedder), PROMPTS)]
    assert np.array_equal(np.concatenate(stored), np.concatenate([block.emb_BV for block in case.blocks]))


@pytest.mark.parametrize("name", NETWORK)
def test_threads_do_not_share_what_a_class_was_given(case_of: CaseOf, name: str, tmp_path: Path) -> None:
    case = case_of(name)
    rows = []
    for threads in (1, 3):
        embedder = open_embedder(case.folder, PROMPTS, tmp_path, threads=threads, batch_tokens=48)
        assert embedder.num_workers == threads
        rows.append(np.concatenate([block.emb_BV for block in embed(embedder, PROMPTS * 4)]))
    assert np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("name", ["gemma2", "nanochat"])
def test_a_cap_streams_even_where_logits_never_reach_it(name: str, tmp_path: Path) -> None:
    model = make_model(name, logit_std=0.0)
    model.get_output_embeddings().weight.mul_(1e-4)
    embedder = open_embedder(save_model(tmp_path / "model", model, make_tokenizer()), PROMPTS, tmp_path / "work")
    assert embedder.spec.head.kind == "capped"


@pytest.mark.parametrize("name", CLASSES)
def test_batch_mates_do_not_move_a_row(case_of: CaseOf, name: str) -> None:
    embedder, together_NV = case_of(name).embedder, case_of(name).rows_NV
    for row in range(0, len(PROMPTS), 3):
        assert distances(rows_before_rounding(embedder, [PROMPTS[row]])[0], together_NV[row]) <= 2e-6
    some = list(range(len(PROMPTS) - 1, 0, -2))
    assert distances(rows_before_rounding(embedder, [PROMPTS[row] for row in some]), together_NV[some]).max() <= 2e-6


@pytest.mark.parametrize("name", BIASED)
def test_batch_mates_hardly_move_a_bfloat16_row(case_of: CaseOf, name: str, tmp_path: Path) -> None:
    case = case_of(name)
    embedder = open_embedder(case.folder, PROMPTS, tmp_path, dtype="bfloat16")
    assert embedder.spec.dtype == "bfloat16"
    together_NV = rows_before_rounding(embedder, PROMPTS)
    assert 1e-5 < distances(together_NV, case.rows_NV).max() < 1e-2  # it did run in bfloat16
    for row in range(0, len(PROMPTS), 4):
        assert distances(rows_before_rounding(embedder, [PROMPTS[row]])[0], together_NV[row]) <= 5e-4


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        pytest.param(
            "float32", marks=pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="layers cannot be packed here")
        ),
    ],
)
def test_a_model_whose_kernels_are_kept_sees_few_shapes(
    dtype: str, case_of: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel is made for each and kept, so windows that end in any number of rows must not bring a new one each."""
    embedder = open_embedder(case_of("llama").folder, PROMPTS, tmp_path, dtype=dtype, batch_tokens=640)
    row = embedder.tokens([PROMPTS[0]])
    length = embedder._padded_length(len(row[0].ids_T))
    full = 640 // length
    shapes, genuine = set(), embedder.model.hidden

    def hidden(tokens_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(tokens_BT.shape))
        return genuine(tokens_BT, real_BT)

    monkeypatch.setattr(embedder.model, "hidden", hidden)
    alone_1D = embedder.pool(row, lambda: None).mean_WX
    # of one length, and no two with the same tokens: those would be embedded once
    for count in range(2, 2 * full + 1):
        rows = [row[0], *(_with_last(row[0], 3 + number) for number in range(count - 1))]
        mean_WD = embedder.pool(rows, lambda: None).mean_WX
        assert (mean_WD[0] - alone_1D[0]).norm() <= 5e-4 * alone_1D.norm()
    assert full > 16
    assert shapes == {(rows, length) for rows in (full, *(1 << power for power in range(full.bit_length())))}


def _with_last(row: TokenRow, token: int) -> TokenRow:
    return dataclasses.replace(row, ids_T=np.append(row.ids_T[:-1], token))


def test_batches_hold_twice_the_tokens_in_16_bits_where_memory_allows(case_of: CaseOf, tmp_path: Path) -> None:
    folder = case_of("llama").folder
    single = open_embedder(folder, PROMPTS, tmp_path / "float32")
    double = open_embedder(folder, PROMPTS, tmp_path / "bfloat16", dtype="bfloat16")
    chosen = open_embedder(folder, PROMPTS, tmp_path / "chosen", dtype="bfloat16", batch_tokens=1024)
    memory_bytes = (chosen.memory_bytes(16) + double.memory_bytes(16)) // 2
    assert chosen.memory_bytes(16) < memory_bytes < double.memory_bytes(16)
    fitted = open_embedder(folder, PROMPTS, tmp_path / "fitted", dtype="bfloat16", memory_bytes=memory_bytes)
    assert [each.spec.batch_tokens for each in (single, double, chosen, fitted)] == [1024, 2048, 1024, 1024]


def test_padding_side_and_pad_token_do_not_matter(case_of: CaseOf, tmp_path: Path) -> None:
    case = case_of("llama")
    variants = [{"left": True}, {"pad": "<s>"}, {"pad": "<|turn|>"}, {"pad": None}, {"pad": None, "eos": None}]
    for number, options in enumerate(variants):
        folder = save_model(tmp_path / str(number), case.model, make_tokenizer(**options))
        rows_NV = rows_before_rounding(open_embedder(folder, PROMPTS, tmp_path / "work"), PROMPTS)
        assert distances(rows_NV, case.rows_NV).max() <= 1e-7, options


def test_a_tokenizer_file_that_pads_and_truncates_changes_no_row(case_of: CaseOf, tmp_path: Path) -> None:
    case, tokenizer = case_of("llama"), make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    folder = save_model(tmp_path / "model", case.model, tokenizer)
    rows_NV = rows_before_rounding(open_embedder(folder, PROMPTS, tmp_path / "work"), PROMPTS)
    assert distances(rows_NV, case.rows_NV).max() <= 1e-7


@pytest.mark.parametrize("name", ["llama", "nanochat"])
def test_special_tokens_condition_but_are_not_pooled(case_of: CaseOf, name: str, tmp_path: Path) -> None:
    case, tokenizer = case_of(name), make_tokenizer(bos=True)
    folder = save_model(tmp_path / "model", case.model, tokenizer)
    rows_NV = rows_before_rounding(open_embedder(folder, PROMPTS, tmp_path / "work"), PROMPTS)
    with_special = [tokenizer(prompt.text).input_ids for prompt in PROMPTS]
    assert all(ids[0] == 0 and ids[-1] == 1 for ids in with_special)
    logits = oracle_logits(case.model, with_special)
    assert distances(rows_NV, np.stack([unit_mean(logits_TV[1:-1]) for logits_TV in logits])).max() <= 5e-6
    assert distances(rows_NV, np.stack([unit_mean(logits_TV) for logits_TV in logits])).min() > 1e-3
    assert distances(rows_NV, case.rows_NV).min() > 1e-3


def chats() -> list[Prompt]:
    turns = [("system", "be brief"), ("user", "why does light"), ("assistant", "a sum of seven"), ("user", "explain")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return [Prompt(id=None, messages=tuple(messages[start:stop])) for start, stop in ((0, 2), (1, 2), (0, 4), (1, 4))]


def test_a_chat_goes_through_the_template_and_pools_no_marker(case_of: CaseOf, tmp_path: Path) -> None:
    """<|turn|> is special only to the template: no named special token of the tokenizer."""
    case, tokenizer = case_of("llama"), make_tokenizer(bos=True, template=True)
    folder = save_model(tmp_path / "model", case.model, tokenizer)
    rows_NV = rows_before_rounding(open_embedder(folder, chats(), tmp_path / "work"), chats())
    texts = ["<s>" + "".join(f"<|turn|>{m['role']}: {m['content']}" for m in chat.messages or ()) for chat in chats()]
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert [ids.count(2) for ids in tokens] == [2, 1, 4, 3]
    own = [np.array(ids) > 2 for ids in tokens]
    logits = oracle_logits(case.model, tokens)
    expected_NV = np.stack([unit_mean(logits_TV, own_T) for logits_TV, own_T in zip(logits, own, strict=True)])
    assert distances(rows_NV, expected_NV).max() <= 5e-6


def test_a_chat_without_a_template_is_its_lines(case_of: CaseOf) -> None:
    embedder = case_of("llama").embedder
    lines = "system: be brief\nuser: why does light"
    as_chat_NV = rows_before_rounding(embedder, chats()[:1])
    assert np.array_equal(as_chat_NV, rows_before_rounding(embedder, [Prompt(id=None, text=lines)]))


def test_a_chat_that_the_template_refuses_has_no_row_and_moves_no_other(case_of: CaseOf, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=True)
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no\n system role') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    folder = save_model(tmp_path / "model", case_of("llama").model, tokenizer)
    sound = [prompt for prompt in chats() if prompt.messages and prompt.messages[0]["role"] != "system"]
    refused = next(prompt for prompt in chats() if prompt.messages and prompt.messages[0]["role"] == "system")
    mixed = [*sound, refused, *PROMPTS]
    embedder = open_embedder(folder, mixed, tmp_path / "work")
    blocks = list(embedder.embed(mixed, first_row=100, chunk_rows=16, check=no_check))
    failed = [row for block in blocks for row in block.failed]
    assert [(row.row, row.reason) for row in failed] == [(100 + len(sound), "the chat template refuses it: no system role")]
    rows_NV = np.concatenate([block.emb_BV for block in blocks])
    assert np.isnan(rows_NV).all(axis=1).nonzero()[0].tolist() == [len(sound)]
    expected_NV = rows_before_rounding(embedder, [*sound, *PROMPTS])
    assert distances(np.delete(rows_NV, len(sound), axis=0).astype(np.float32), expected_NV).max() <= 5e-4


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", make_model("llama", vocab_size=150), make_tokenizer())
    with pytest.raises(ModelError, match="the model knows 150 tokens"):
        open_embedder(folder, PROMPTS, tmp_path / "work")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_only_the_first_max_tokens_count(case_of: CaseOf, name: str, tmp_path: Path) -> None:
    case = case_of(name)
    embedder = open_embedder(case.folder, PROMPTS, tmp_path, max_tokens=7)
    expected_NV = np.stack([unit_mean(logits_TV[:7]) for logits_TV in case.logits])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_NV).max() <= 5e-6
    embed(embedder, PROMPTS)
    lengths = np.array([len(logits_TV) for logits_TV in case.logits])
    assert 0 < embedder.counts.truncated == (lengths > 7).sum() < len(PROMPTS)
    assert embedder.counts.tokens == np.minimum(lengths, 7).sum()


def test_max_tokens_never_passes_the_models_positions(case_of: CaseOf, tmp_path: Path) -> None:
    notices: list[Event] = []
    longest = Prompt(id=None, text="why " * 300)
    embedder = open_embedder(case_of("gpt2").folder, [longest], tmp_path, max_tokens=500, observer=notices.append)
    assert embedder.spec.max_tokens == 128
    assert any(isinstance(event, Notice) and "128" in event.message for event in notices)
    embed(embedder, [longest])
    assert (embedder.counts.tokens, embedder.counts.truncated) == (128, 1)


@pytest.mark.parametrize("name", ["llama", "phi", "nanochat"])
def test_vocab_tokenizer_drops_padding_columns(case_of: CaseOf, name: str, tmp_path: Path) -> None:
    case, columns = case_of(name), len(make_tokenizer())
    assert columns < VOCABULARY == case.embedder.spec.dimension
    embedder = open_embedder(case.folder, PROMPTS, tmp_path, vocab="tokenizer")
    assert (embedder.spec.dimension, embedder.spec.columns) == (columns, "tokenizer")
    expected_NV = np.stack([unit_mean(logits_TV[:, :columns]) for logits_TV in case.logits])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_NV).max() <= 5e-6
    block = embed(embedder, PROMPTS)[0]
    assert block.emb_BV.shape[1] == columns
    if embedder.spec.basis == "range-finder":
        assert embedder.basis_VR.shape[0] == columns


@pytest.mark.parametrize("name", CLASSES)
def test_a_stored_row_is_the_rounding_of_its_row(case_of: CaseOf, name: str) -> None:
    case = case_of(name)
    assert [block.emb_BV.shape for block in case.blocks] == [(10, VOCABULARY), (10, VOCABULARY), (4, VOCABULARY)]
    assert case.blocks[0].emb_BV.dtype == np.float16
    half_ulp_NV = np.spacing(np.abs(case.rows_NV).astype(np.float16)).astype(np.float64) / 2
    assert (np.abs(case.stored_NV - case.rows_NV) <= half_ulp_NV + 1e-7).all()


@pytest.mark.parametrize("name", CLASSES)
def test_coordinates_keep_distances_within_the_residuals(case_of: CaseOf, name: str) -> None:
    case = case_of(name)
    coord_NR = case.coord_NR.astype(np.float64)
    assert np.abs(coord_NR @ coord_NR.T - case.rows_NV @ case.rows_NV.T).max() <= 2e-6
    if case.embedder.spec.basis == "range-finder":
        basis_VR = case.embedder.basis_VR.astype(np.float64)
        assert np.abs(basis_VR.T @ basis_VR - np.eye(basis_VR.shape[1])).max() <= 1e-6
        assert distances(coord_NR, case.rows_NV @ basis_VR).max() <= 2e-6
    assert case.residual_N.max() < 5e-4  # all that is lost is float16 rounding
    check_residuals_bound_distances(case)


@pytest.mark.parametrize("name", CAPPED)
def test_residuals_tell_what_the_pilots_basis_misses(case_of: CaseOf, name: str, tmp_path: Path) -> None:
    """A pilot of 12 rows cannot span 24."""
    embedder = open_embedder(case_of(name).folder, PROMPTS[:12], tmp_path)
    case = dataclasses.replace(case_of(name), embedder=embedder, blocks=embed(embedder, PROMPTS))
    assert case.coord_NR.shape[1] == 12
    assert case.residual_N[:12].max() < 5e-4
    assert case.residual_N[12:].max() > 5e-3
    check_residuals_bound_distances(case)


def check_residuals_bound_distances(case: Case) -> None:
    # coordinates of an affine head are those of the row itself, before it is rounded
    is_sampled = case.embedder.spec.basis == "range-finder"
    image_NV = case.coord_NR @ case.embedder.basis_VR.astype(np.float64).T if is_sampled else case.rows_NV
    expected_N = np.linalg.norm(case.stored_NV - image_NV, axis=1)
    assert case.residual_N == pytest.approx(expected_N, abs=1e-5)
    left, right = np.triu_indices(len(PROMPTS), 1)
    between = distances(case.stored_NV[left], case.stored_NV[right])
    error = np.abs(between - distances(case.coord_NR[left], case.coord_NR[right]))
    assert (error <= case.residual_N[left] + case.residual_N[right] + 1e-6).all()


@pytest.mark.parametrize("name", CLASSES)
def test_a_reopened_embedder_gives_the_same_bytes(case_of: CaseOf, name: str) -> None:
    case = case_of(name)
    for again, first in zip(embed(reopened(case.folder, case.embedder), PROMPTS), case.blocks, strict=True):
        assert np.array_equal(again.emb_BV, first.emb_BV)
        assert np.array_equal(again.coord_BR, first.coord_BR)
        assert np.array_equal(again.residual_B, first.residual_B)
