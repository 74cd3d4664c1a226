"""A failure in a model fails one row, by name; a batch too large is split; no tensor is as large as logits of a batch."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError, RowError
from embstore.core.interfaces import RowBlock
from embstore.core.prompts import Prompt
from embstore.host.threads import Urgency, Workers
from embstore.model.backbone import SplitModel
from embstore.model.locate import locate_model
from embstore.model.source import TorchSource
from tests.support.models import (
    PROMPTS,
    Case,
    distances,
    embed,
    make_model,
    make_prompts,
    make_tokenizer,
    open_embedder,
    oracle_logits,
    save_model,
    unit_mean,
)

CaseOf = Callable[[str], Case]


def failures(blocks: list[RowBlock]) -> dict[int, str]:
    return {failed.row: failed.reason for block in blocks for failed in block.failed}


@pytest.mark.parametrize("longest_fails", [False, True])
def test_rows_a_nan_reaches_fail_by_name_and_no_other_row_moves(
    case_of: CaseOf, longest_fails: bool, tmp_path: Path
) -> None:
    """One embedding is NaN. Where the probe's prompt holds it, the head gets no verdict and is streamed."""
    tokenizer, model = make_tokenizer(), make_model("llama")
    (poison,) = tokenizer("~").input_ids
    model.get_input_embeddings().weight[poison] = math.nan
    prompts = list(PROMPTS)
    by_length = sorted(range(len(prompts)), key=lambda row: len(case_of("llama").logits[row]))
    bad = {*by_length[:2], *(by_length[-1:] if longest_fails else [])}
    for row in bad:
        prompts[row] = dataclasses.replace(prompts[row], text=f"{prompts[row].text} ~")
    embedder = open_embedder(save_model(tmp_path / "model", model, tokenizer), prompts, tmp_path / "work")
    assert embedder.spec.head.kind == ("streamed" if longest_fails else "affine")
    blocks = embed(embedder, prompts)
    assert failures(blocks) == dict.fromkeys(sorted(bad), "the model gives a non-finite logit")
    emb_NV = np.concatenate([block.emb_BV for block in blocks]).astype(np.float64)
    coord_NR = np.concatenate([block.coord_BR for block in blocks])
    residual_N = np.concatenate([block.residual_B for block in blocks])
    good = [row for row in range(len(prompts)) if row not in bad]
    assert distances(emb_NV[good], case_of("llama").stored_NV[good]).max() <= 2e-4
    assert np.isfinite(coord_NR[good]).all()
    for array in (emb_NV, coord_NR, residual_N):
        assert np.isnan(array[sorted(bad)]).all()


@pytest.mark.parametrize("name", ["llama", "nanochat"])
@pytest.mark.parametrize(
    ("value", "reason"), [(math.nan, "the model gives a non-finite logit"), (0.0, "the mean logits have zero norm")]
)
def test_a_dead_head_fails_every_row_by_name(case_of: CaseOf, name: str, value: float, reason: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.get_output_embeddings().weight.fill_(value)
    folder = save_model(tmp_path / "model", model, make_tokenizer())
    with pytest.raises(RowError, match="no sampled prompt"):
        open_embedder(folder, PROMPTS, tmp_path / "work")
    living = case_of(name).embedder
    # what coordinates are comes from the head, where it is affine
    basis = living.basis_VR * np.float32(value) if living.spec.basis == "gram" else living.basis_VR
    dead = TorchSource(locate_model(EmbeddingConfig(model=str(folder)))).reopen(living.spec, basis)
    blocks = list(dead.embed(PROMPTS, first_row=70, chunk_rows=10, check=lambda: None))
    assert failures(blocks) == dict.fromkeys(range(70, 70 + len(PROMPTS)), reason)
    assert all(np.isnan(block.emb_BV).all() for block in blocks)


def test_a_prompt_without_own_tokens_fails_by_name(case_of: CaseOf, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", case_of("phi").model, make_tokenizer(template=True))
    only_markers = Prompt(id=None, text="")
    embedder = open_embedder(folder, PROMPTS, tmp_path / "work")
    blocks = embed(embedder, [PROMPTS[0], only_markers, PROMPTS[1]])
    assert failures(blocks) == {1: "the prompt has no tokens: the tokenizer returned none, or only special ones"}


@pytest.fixture
def device_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Set how many rows fit the device; batches above fail as a GPU does, and must be let go before the next one."""
    genuine, left_behind = SplitModel.hidden, []

    def limit(rows: int) -> None:
        def hidden(self: SplitModel, tokens_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
            assert not any(reference() is not None for reference in left_behind)
            activations = torch.zeros(4)
            left_behind.append(weakref.ref(activations))
            if len(tokens_BT) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return genuine(self, tokens_BT, real_BT)

        monkeypatch.setattr(SplitModel, "hidden", hidden)

    return limit


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_batch_that_does_not_fit_is_split_and_counted(
    case_of: CaseOf, name: str, device_memory: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name)
    monkeypatch.setattr("embstore.model.embed.makes_kernels", lambda spec: False)  # as on an accelerator
    assert case.embedder.counts.splits == 0
    device_memory(7)
    rows_NV = np.concatenate([block.emb_BV for block in embed(case.embedder, PROMPTS)]).astype(np.float64)
    assert case.embedder.counts.splits == 3  # 24 rows in one batch: 24 -> 12 + 12 -> 6 + 6 + 6 + 6
    assert distances(rows_NV, case.stored_NV).max() <= 2e-4
    device_memory(0)
    with pytest.raises(ModelError, match="does not fit the device's memory"):
        embed(case.embedder, PROMPTS)


def _run_here(self: Workers, job: Callable[[], None], urgency: Urgency = ()) -> Future[None]:
    done: Future[None] = Future()
    with torch.inference_mode():
        job()
    done.set_result(None)
    return done


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any tensor had that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["llama", "nanochat"])
def test_nan_at_padding_reaches_no_row(case_of: CaseOf, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some attention kernels give NaN where every key is masked."""
    case, genuine = case_of(name), SplitModel.hidden

    def hidden(self: SplitModel, tokens_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        return genuine(self, tokens_BT, real_BT).masked_fill(~real_BT[..., None], math.nan)

    monkeypatch.setattr(SplitModel, "hidden", hidden)
    blocks = embed(case.embedder, PROMPTS)
    assert failures(blocks) == {}
    assert np.array_equal(np.concatenate([block.emb_BV for block in blocks]), case.stored_NV)


@pytest.mark.parametrize("name", ["llama", "nanochat"])
def test_logits_of_a_whole_batch_never_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With V = 8192 the logits of a batch would have 16 Mi elements; the stated block has 4 Mi, cut within a prompt too."""
    model, tokenizer = make_model(name, vocab_size=8192), make_tokenizer()
    prompts = make_prompts(160)
    folder = save_model(tmp_path / "model", model, tokenizer)
    embedder = open_embedder(folder, prompts, tmp_path / "work", batch_tokens=2048)
    monkeypatch.setattr(Workers, "submit", _run_here)  # what watches tensors watches one thread
    with LargestTensor() as seen:
        blocks = embed(embedder, prompts)
    assert embedder.spec.batch_tokens * 8192 == 4 * (4 << 20)
    assert embedder.counts.tokens > embedder.spec.batch_tokens
    assert 10 * 8192 <= seen.elements <= 4 << 20
    emb_NV = np.concatenate([block.emb_BV for block in blocks]).astype(np.float64)
    for row in range(0, len(prompts), 2):
        (logits_TV,) = oracle_logits(model, [tokenizer(prompts[row].text).input_ids])
        assert distances(emb_NV[row], unit_mean(logits_TV)) <= 3e-4
