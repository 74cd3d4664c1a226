"""Copied rows against those a full build makes, with real model classes: values do not depend on where they came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig
from embstore.flow.build import build
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.storage.verify import verify_store
from tests.support.models import make_model, make_prompts, make_tokenizer, save_model
from tests.support.stores import write_lines

TOLERANCE = 2e-6  # L2, float32: what batch mates may move a row by
NUM_ROWS = 160


def _build(prompts: Path, model: Path, out: Path, *reuse: Path) -> EmbeddingStore:
    config = BuildConfig(
        embedding=EmbeddingConfig(model=str(model), dtype="float32", threads=1, chunk_rows=16, window_rows=64),
        density=DensityConfig(knn="exact"),
        reuse=tuple(str(path) for path in reuse),
    )
    build(prompts, out=out, config=config)
    return open_store(out)


@pytest.mark.parametrize(("kind", "head"), [("llama", "affine"), ("gemma2", "capped")])
def test_rows_do_not_depend_on_whether_they_were_copied(kind: str, head: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", make_model(kind), make_tokenizer())
    texts = [{"prompt": prompt.text} for prompt in make_prompts(NUM_ROWS)]
    old = _build(write_lines(tmp_path / "old.jsonl", texts[:130]), model, tmp_path / "old")
    prompts = write_lines(tmp_path / "new.jsonl", texts[10:][::-1])
    full = _build(prompts, model, tmp_path / "full")
    new = _build(prompts, model, tmp_path / "new", tmp_path / "old")
    assert new.spec.embedding == old.spec.embedding
    assert new.spec.embedding.head.kind == head
    assert new.spec.basis_sha256 == old.spec.basis_sha256, "the basis is handed on, also one that was made from a sample"
    copied = {row for rows in verify_store(tmp_path / "new").reused for row in range(*rows)}
    assert copied == set(range(30, 150))
    rows_NV, expected_NV = (store.rows(full.ids).astype(np.float64) for store in (new, full))
    # stored rows are rounded to float16: a row that moved by 1e-6 may round to the next number here and there
    step_NV = np.maximum(np.spacing(expected_NV.astype(np.float16)).astype(np.float64), 2.0**-24)
    assert (np.abs(rows_NV - expected_NV) <= step_NV + TOLERANCE).all()
    assert np.median(np.linalg.norm(rows_NV - expected_NV, axis=1)) < TOLERANCE
    if head == "affine":  # one basis for all three
        maps = [np.load(tmp_path / name / "coordinate_map.npy") for name in ("old", "full", "new")]
        np.testing.assert_array_equal(maps[1], maps[0])
        np.testing.assert_array_equal(maps[2], maps[0])
        assert np.linalg.norm(new.coordinates - full.coordinates, axis=1).max() <= TOLERANCE
    # the coordinates still say how far rows are apart, up to their residuals
    left, right = np.triu_indices(len(rows_NV), 1)
    apart, found = (np.linalg.norm(vectors[left] - vectors[right], axis=1) for vectors in (rows_NV, new.coordinates))
    assert (np.abs(apart - found) <= new.residuals[left] + new.residuals[right] + 1e-6).all()
    if head == "affine":
        return
    basis_VR = np.load(tmp_path / "new" / "basis.npy").astype(np.float64)
    found_N = np.linalg.norm(rows_NV - new.coordinates.astype(np.float64) @ basis_VR.T, axis=1)
    np.testing.assert_allclose(found_N, new.residuals, rtol=1e-2, atol=1e-4)
