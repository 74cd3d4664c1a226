"""Coordinates of soft-capped heads against float64 rows of the unmodified class, every pair of prompts.

Logits have a standard deviation of 5 and more, so that the cap bends them. Rows of a random model have little in common,
which is the hardest case; rows of a trained one share a direction (0.998 of their norm), which a common vector added to the
token embeddings brings about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embstore.core.diagnostics import total_variation
from tests.support.models import (
    embed,
    make_model,
    make_prompts,
    make_tokenizer,
    open_embedder,
    oracle_logits,
    save_model,
    unit_mean,
)

COUNT, K = 300, 10


def make_capped(name: str, common: float) -> Any:
    """A model of the class whose token embeddings share a vector ``common`` times as long as they are."""
    model = make_model(name, logit_std=1e-3, tie_word_embeddings=False)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    direction_D = torch.randn(table.shape[1])
    table.add_(direction_D * (common * table.norm(dim=1).mean() / direction_D.norm()))
    tokens = torch.randint(3, 256, (4, 48))
    while (found := float(model(input_ids=tokens).logits.std())) < 6:
        head.mul_(min(2.0, 6.5 / found))
    return model


def all_distances(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """Distances of all pairs by direct differences, +inf on the diagonal."""
    double = rows.astype(np.float64)
    found = np.stack([np.linalg.norm(double - row, axis=1) for row in double])
    np.fill_diagonal(found, np.inf)
    return found


@pytest.mark.parametrize(
    ("name", "common", "least_recall", "most_tv"),
    [
        ("nanochat", 0.0, 0.997, 5e-4),
        ("nanochat", 4.0, 0.9999, 1e-4),
        ("gemma2", 0.0, 0.997, 5e-4),
        ("gemma2", 4.0, 0.9999, 1e-4),
    ],
)
def test_neighbours_by_coordinates_are_those_of_the_classes_own_rows(
    name: str, common: float, least_recall: float, most_tv: float, tmp_path: Path
) -> None:
    tokenizer, model, prompts = make_tokenizer(), make_capped(name, common), make_prompts(COUNT)
    ids = [tokenizer(prompt.text).input_ids for prompt in prompts]
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([max(ids, key=len)])).logits.std() >= 5
    embedder = open_embedder(save_model(tmp_path / "model", model, tokenizer), prompts, tmp_path / "work")
    assert (embedder.spec.head.kind, embedder.spec.basis) == ("capped", "range-finder")
    blocks = embed(embedder, prompts)
    stored, coordinates = (np.concatenate(parts) for parts in zip(*((b.emb_BV, b.coord_BR) for b in blocks), strict=True))
    residual = np.concatenate([block.residual_B for block in blocks]).astype(np.float64)
    rows = np.stack([unit_mean(logits) for logits in oracle_logits(model, ids)])

    image = coordinates.astype(np.float64) @ embedder.basis_VR.astype(np.float64).T
    np.testing.assert_allclose(residual, np.linalg.norm(stored.astype(np.float64) - image, axis=1), atol=2e-6)
    of_stored, of_coordinates, exact = all_distances(stored), all_distances(coordinates), all_distances(rows)
    pairs = ~np.eye(COUNT, dtype=np.bool_)
    assert (np.abs(of_stored[pairs] - of_coordinates[pairs]) <= (residual[:, None] + residual)[pairs] + 1e-6).all()

    nearest = np.argsort(of_coordinates, axis=1, kind="stable")[:, :K]
    kth = np.sort(exact, axis=1)[:, K - 1 : K]
    recall = (np.take_along_axis(exact, nearest, axis=1) <= kth * (1 + 1e-4)).mean()
    weights = [np.sort(distances, axis=1)[:, :K].mean(axis=1) for distances in (of_coordinates, exact)]
    shared = np.linalg.norm(rows.mean(axis=0))
    assert (shared > 0.98) == (common > 0)
    assert recall >= least_recall
    assert total_variation(*weights) <= most_tv
    assert residual.max() > 3e-4  # more than rounding: the cap is really there
