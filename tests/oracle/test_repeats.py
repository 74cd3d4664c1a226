"""Prompts with the same tokens: the model sees them once a window, and they get the same row to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig
from embstore.core.interfaces import RowBlock
from embstore.core.prompts import Prompt
from embstore.flow.build import build
from embstore.model.batches import TokenBatch
from embstore.model.embed import LogitEmbedder
from embstore.model.repeats import without_repeats
from embstore.model.tokens import TokenRow
from embstore.storage.reader import open_store
from tests.support.models import (
    PROMPTS,
    Case,
    distances,
    embed,
    make_model,
    make_prompts,
    make_tokenizer,
    open_embedder,
    save_model,
)
from tests.support.stores import write_lines

CaseOf = Callable[[str], Case]

# equal up to max_tokens, in rows far from each other and between others
LONG = "the light of a prime number " * 12
REPEATED = [Prompt(id=None, text=LONG + "one"), *PROMPTS, Prompt(id=None, text=LONG + "two"), PROMPTS[3], PROMPTS[0]]


def seen_rows(embedder: LogitEmbedder, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The real tokens of each row that the model is given."""
    seen: list[bytes] = []
    genuine = embedder.model.hidden

    def hidden(tokens_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        seen.extend(row[real].numpy().tobytes() for row, real in zip(tokens_BT, real_BT, strict=True))
        return genuine(tokens_BT, real_BT)

    monkeypatch.setattr(embedder.model, "hidden", hidden)
    return seen


def joined(blocks: list[RowBlock], name: str) -> np.ndarray[Any, Any]:
    return np.concatenate([getattr(block, name) for block in blocks])


@pytest.mark.parametrize("name", ["llama", "nanochat", "modernbert-decoder"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_each_sequence_of_tokens_is_embedded_once(
    name: str, pooling: str, case_of: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = open_embedder(case_of(name).folder, REPEATED, tmp_path, max_tokens=48, pooling=pooling, batch_tokens=256)
    seen = seen_rows(embedder, monkeypatch)
    blocks = embed(embedder, REPEATED)
    tokens = embedder.tokens(REPEATED)
    assert len({row.ids_T.tobytes() for row in tokens}) == len(REPEATED) - 3
    assert len(set(seen)) == len(REPEATED) - 3
    filled_up = (
        0 if not embedder.spec.packed_layers else len(seen) - len(set(seen))
    )  # a batch is filled up with its first row
    assert len(seen) - filled_up == len(REPEATED) - 3
    for field in ("emb_BV", "coord_BR", "residual_B"):
        rows = joined(blocks, field)
        for first, repeat in ((0, len(PROMPTS) + 1), (4, len(PROMPTS) + 2), (1, len(PROMPTS) + 3)):
            assert rows[first].tobytes() == rows[repeat].tobytes()
    assert embedder.counts.tokens == sum(int(row.pooled_T.sum()) for row in tokens)
    assert embedder.counts.truncated == sum(row.was_cut for row in tokens) >= 2
    alone = [joined(embed(embedder, [prompt]), "emb_BV")[0] for prompt in REPEATED]
    assert distances(joined(blocks, "emb_BV").astype(np.float64), np.stack(alone).astype(np.float64)).max() <= 2e-4


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_prompts_cut_alike_share_one_weight_though_their_windows_round_otherwise(
    pooling: str, case_of: CaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU takes another kernel for a batch of another height; here the means of a batch depend on its height."""
    genuine = LogitEmbedder._pool_whole

    def pooled(self: LogitEmbedder, batch: TokenBatch, mean_WX: torch.Tensor) -> None:
        genuine(self, batch, mean_WX)
        mean_WX[torch.from_numpy(batch.rows_B), 0] += 1e-5 * len(batch.rows_B)

    monkeypatch.setattr(LogitEmbedder, "_pool_whole", pooled)
    config = BuildConfig(
        embedding=EmbeddingConfig(
            model=str(case_of("llama").folder),
            dtype="float32",
            threads=1,
            chunk_rows=16,
            window_rows=16,
            batch_tokens=128,
            max_tokens=48,
            pooling=pooling,  # type: ignore[arg-type]
        ),
        density=DensityConfig(knn="exact"),
    )
    texts = [
        LONG + "one",
        *(LONG[5 * index :] for index in range(1, 4)),
        *(prompt.text or "" for prompt in make_prompts(28)),
    ]
    stores = []
    for name, kept in (("both", [*texts, LONG + "two"]), ("once", texts)):
        build(
            write_lines(tmp_path / f"{name}.jsonl", [{"prompt": text} for text in kept]), out=tmp_path / name, config=config
        )
        stores.append(open_store(tmp_path / name))
    both = stores[0]
    assert both.sequences is not None
    assert both.sequences[0] == both.sequences[32]
    assert len(set(both.sequences.tolist())) == 32
    assert both.coordinates[0].tobytes() != both.coordinates[32].tobytes(), "the windows round otherwise"
    assert np.asarray(both.groups).tolist() == [*range(32), 0]
    weights, alone = (np.asarray(store.weights, dtype=np.float64) for store in stores)
    assert weights[0] == weights[32]
    assert weights[0] + weights[32] == pytest.approx(alone[0], rel=1e-3)
    np.testing.assert_allclose(weights[1:32], alone[1:], rtol=1e-3)


def test_repeats_of_a_prompt_that_fails_fail_alike(case_of: CaseOf, tmp_path: Path) -> None:
    model = make_model("llama")
    model.get_input_embeddings().weight[make_tokenizer()("§").input_ids[0]] = torch.nan
    folder = save_model(tmp_path / "model", model, make_tokenizer())
    embedder = open_embedder(folder, PROMPTS, tmp_path / "work")
    prompts = [PROMPTS[0], Prompt(id=None, text="a §"), PROMPTS[1], Prompt(id=None, text="a §"), PROMPTS[0]]
    blocks = embed(embedder, prompts)
    assert [failed.row for block in blocks for failed in block.failed] == [1, 3]
    rows = joined(blocks, "emb_BV")
    assert np.isnan(rows[[1, 3]]).all()
    assert rows[0].tobytes() == rows[4].tobytes()


def test_rows_whose_tokens_are_pooled_otherwise_are_no_repeats() -> None:
    def row(ids: list[int], pooled: list[bool]) -> TokenRow:
        return TokenRow(ids_T=np.array(ids), pooled_T=np.array(pooled), was_cut=False)

    rows = [row([1, 2], [True, True]), row([1, 2], [False, True]), row([1], [True]), row([1, 2], [True, True]), row([], [])]
    distinct, copies, sequence_W = without_repeats(rows)
    assert copies == {0: [3]}
    assert sequence_W[0] == sequence_W[3] != 0
    assert len(set(sequence_W.tolist())) == 4
    assert [len(each.ids_T) for each in distinct] == [2, 2, 1, 0, 0]
