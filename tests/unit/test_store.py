"""Reading a store: the bytes other readers see, what is refused, neighbours, new weights, exports."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numpy.typing import NDArray

from embstore.core import files
from embstore.core.config import WeightingConfig
from embstore.core.errors import (
    BudgetError,
    ConfigError,
    CorruptStoreError,
    IncompleteStoreError,
    StorageError,
    StoreExistsError,
    StoreNotFoundError,
)
from embstore.core.format import JOURNAL, MULTIPLICITY, chunk_name
from embstore.core.records import PromptsRecord, decode_journal, encode_journal_record
from embstore.flow.artifact import recompute_weights
from embstore.flow.build import build
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.views.export import export_store
from embstore.views.info import inspect, neighbors_of, verify
from tests.support.build_fake import CONFIG
from tests.support.fake import DIMENSION, FakeSource
from tests.support.faults import SystemCalls
from tests.support.stores import (
    NUM_CHUNKS,
    NUM_ROWS,
    build_small,
    snapshot,
    with_embedding,
    with_weighting,
    write_lines,
)

pytestmark = pytest.mark.usefixtures("without_syncs")


def expected_rows(store: EmbeddingStore) -> NDArray[np.float16]:
    """Every row of a finished store, as the embedder gives it for the stored prompts."""
    source = FakeSource()
    embedder = source.reopen(store.spec.embedding, np.load(store.root / "basis.npy"))
    prompts = store.prompts.sample(range(store.num_rows))
    blocks = embedder.embed(prompts, first_row=0, chunk_rows=16, check=lambda: None)
    return np.concatenate([block.emb_BV for block in blocks])


def read_by_tensorstore(store: Path) -> NDArray[np.float16]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store / 'embeddings.zarr'}/"}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


@pytest.mark.parametrize("compressor", ["lz4", "none"])
def test_every_reader_sees_the_same_bytes(compressor: str, small_prompts: Path, tmp_path: Path) -> None:
    build_small(small_prompts, tmp_path / "store", config=with_embedding(compressor=compressor))
    store = open_store(tmp_path / "store")
    expected = expected_rows(store)
    assert store.embeddings.shape == expected.shape == (NUM_ROWS, DIMENSION)
    assert np.asarray(store.embeddings[:]).tobytes() == expected.tobytes()
    assert np.asarray(zarr.open_array(store.root / "embeddings.zarr", mode="r")[60:]).tobytes() == expected[60:].tobytes()
    assert read_by_tensorstore(store.root).tobytes() == expected.tobytes()
    assert np.concatenate([block for _, block in store.iter_rows()]).tobytes() == expected.tobytes()
    assert [(rows.start, rows.stop) for rows, _ in store.iter_rows()] == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 70)]
    assert store.read_chunk(4).tobytes() == expected[64:].tobytes()
    wanted = [69, 0, 33, 33]
    assert store.rows([store.ids[row] for row in wanted]).tobytes() == expected[wanted].tobytes()
    assert store.rows([]).shape == (0, DIMENSION)


def test_uncompressed_rows_can_be_mapped_where_they_lie(small_prompts: Path, tmp_path: Path) -> None:
    build_small(small_prompts, tmp_path / "store", config=with_embedding(compressor="none"))
    store = open_store(tmp_path / "store")
    for index in range(NUM_CHUNKS):
        path = store.root / chunk_name(index)
        mapped = np.memmap(path, dtype="<f2", mode="r", shape=(16, DIMENSION))
        rows = store.read_chunk(index)
        assert mapped[: len(rows)].tobytes() == rows.tobytes()
        assert np.isnan(mapped[len(rows) :]).all(), "padding of the last chunk"
        assert path.stat().st_size == mapped.nbytes + 4, "a crc32c follows"


def test_rows_that_were_never_written_are_nan_for_every_reader(partial_store: Path) -> None:
    store = open_store(partial_store, partial=True)
    assert [(rows.start, rows.stop) for rows in store.committed_rows] == [(0, 32)]
    for rows in (np.asarray(store.embeddings[:]), read_by_tensorstore(partial_store), store.coordinates):
        assert np.isfinite(rows[:32]).all()
        assert np.isnan(rows[32:]).all()
    assert np.isnan(store.residuals[32:]).all()


def test_an_unfinished_store_is_refused_with_what_is_there_and_what_to_do(partial_store: Path) -> None:
    with pytest.raises(IncompleteStoreError, match=r"32 of 70 rows are committed") as caught:
        open_store(partial_store)
    assert "--resume" in str(caught.value.hint)
    with pytest.raises(IncompleteStoreError):
        recompute_weights(partial_store, WeightingConfig())
    with pytest.raises(IncompleteStoreError):
        export_store(partial_store, partial_store.parent / "out")
    assert not (partial_store.parent / "out").exists()


def test_an_unfinished_store_opened_anyway_gives_committed_rows_only(partial_store: Path, finished_store: Path) -> None:
    store, whole = open_store(partial_store, partial=True), open_store(finished_store)
    assert not store.is_complete
    assert store.ids == whole.ids
    assert store.rows(store.ids[:32]).tobytes() == whole.rows(store.ids[:32]).tobytes()
    with pytest.raises(IncompleteStoreError, match="chunk 2"):
        store.rows([store.ids[32]])
    for attribute in ("weights", "metadata", "neighbor_ids", "neighbor_distances", "groups"):
        with pytest.raises(IncompleteStoreError):
            getattr(store, attribute)


def test_a_folder_without_a_store_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        for reader in (open_store, inspect, verify):
            with pytest.raises(StoreNotFoundError, match="is not a store"):
                reader(path)


@pytest.mark.parametrize("name", ["", "a/b", "two\nlines", "\x1b[1m", "x" * 201])
def test_weights_are_never_published_under_a_name_that_readers_refuse(name: str, store: Path) -> None:
    before = (store / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="the name of weights"):
        recompute_weights(store, CONFIG.weighting, name=name)
    assert (store / "manifest.json").read_bytes() == before


def test_every_listed_file_is_looked_at_when_opening(finished_store: Path, store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_bytes())
    for name in manifest["files"]:
        (store / name).write_bytes((finished_store / name).read_bytes()[:-1])
        with pytest.raises(CorruptStoreError, match=f"{name} has .* bytes, but .* were committed") as caught:
            open_store(store)
        assert "verify" in str(caught.value.hint)
        (store / name).unlink()
        with pytest.raises(CorruptStoreError, match=f"{name} is missing"):
            open_store(store)
        shutil.copyfile(finished_store / name, store / name)
    open_store(store)


@pytest.mark.parametrize("attribute", ["ids", "aliases", "metadata", "neighbor_spec"])
def test_a_small_file_that_was_changed_is_refused_when_read(attribute: str, store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_bytes())
    digest = manifest["names"]["default"]
    name = {
        "ids": "ids.json",
        "aliases": "aliases.json",
        "metadata": f"weights/{digest}.json",
        "neighbor_spec": f"neighbors/{manifest['neighbors']}/spec.json",
    }[attribute]
    content = (store / name).read_bytes()
    (store / name).write_bytes(content.replace(b"e", b"f", 1))
    with pytest.raises(CorruptStoreError, match=name):
        getattr(open_store(store), attribute)


def test_a_chunk_that_was_changed_is_refused_when_read(store: Path) -> None:
    path = store / chunk_name(1)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    opened = open_store(store)
    assert len(opened.read_chunk(0)) == 16
    for read in (lambda: opened.read_chunk(1), lambda: opened.rows([opened.ids[17]]), lambda: list(opened.iter_rows())):
        with pytest.raises(CorruptStoreError, match=r"c\.1\.0 has crc32c"):
            read()
    path.unlink()
    with pytest.raises(CorruptStoreError, match=r"c\.1\.0 is missing"):
        opened.read_chunk(1)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on reads")
def test_chunks_that_are_expected_are_begun_and_nothing_else_happens(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[int] = []
    real = os.posix_fadvise

    def noted(handle: int, start: int, length: int, advice: int) -> None:
        advised.append(os.fstat(handle).st_size)
        assert advice == os.POSIX_FADV_WILLNEED
        real(handle, start, length, advice)

    opened = open_store(store)
    sizes = [(store / chunk_name(index)).stat().st_size for index in range(2)]
    monkeypatch.setattr(os, "posix_fadvise", noted)
    (store / chunk_name(2)).unlink()
    for index in (0, 1, 2, 10_000):  # the third is damage, which the read will tell; there is no last one
        opened.prefetch_chunk(index)
    assert advised == sizes


def test_a_missing_spec_is_damage_and_no_traceback(unfinished: Path, small_prompts: Path) -> None:
    (unfinished / "spec.json").unlink()
    for action in (lambda: open_store(unfinished, partial=True), lambda: build_small(small_prompts, unfinished)):
        with pytest.raises(CorruptStoreError, match=r"spec\.json is missing"):
            action()


def test_a_file_that_the_journal_does_not_commit_is_not_read(unfinished: Path) -> None:
    """Of an unfinished store only the row files have no digest."""
    header, prompts, *windows = (unfinished / JOURNAL).read_bytes().splitlines(keepends=True)
    record = decode_journal(header + prompts, name=JOURNAL)[0][0]
    assert isinstance(record, PromptsRecord)
    files = {name: digest for name, digest in record.files.items() if name != MULTIPLICITY}
    fewer = encode_journal_record(1, dataclasses.replace(record, files=files))
    (unfinished / JOURNAL).write_bytes(b"".join([header, fewer, *windows]))
    with pytest.raises(CorruptStoreError, match="does not commit multiplicity"):
        _ = open_store(unfinished, partial=True).multiplicity


def test_arrays_of_a_store_cannot_be_written_to(finished_store: Path) -> None:
    store = open_store(finished_store)
    arrays = (store.weights, store.coordinates, store.residuals, store.neighbor_ids, store.neighbor_distances)
    for array in (*arrays, store.groups, store.keys, store.line_rows, store.multiplicity):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        store.embeddings[0] = 0


def test_ids_aliases_and_multiplicity_are_those_of_the_lines(finished_store: Path) -> None:
    store = open_store(finished_store)
    assert store.row_of("alias-3") == store.row_of(store.ids[3]) == 3
    assert store.ids[64] == "given-0"
    assert store.ids[69] == f"{store.ids[0]}-2"
    assert store.multiplicity[3] == 3
    assert store.multiplicity.sum() == 72
    assert len(store.line_rows) == 73
    assert np.flatnonzero(np.asarray(store.line_rows) == 3).tolist() == [3, 10, 42]
    with pytest.raises(ConfigError, match="no prompt has the id 'nobody'"):
        store.row_of("nobody")


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_an_id_is_found_wherever_its_line_is_cut(
    block_bytes: int, finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_READ_BYTES", block_bytes)
    store = open_store(finished_store)
    known = json.loads((finished_store / "aliases.json").read_bytes())
    assert {name: store.row_of(name) for name in known} == known == store.aliases


def test_neighbours_are_the_nearest_distinct_vectors(finished_store: Path) -> None:
    store = open_store(finished_store)
    coordinates = np.asarray(store.coordinates, dtype=np.float64)
    # rows 66, 67 and 68 share one vector: one neighbour, named by its first row
    distinct = np.array([row for row in range(NUM_ROWS) if row not in (67, 68)])
    assert np.asarray(store.groups).tolist() == [66 if row in (67, 68) else row for row in range(NUM_ROWS)]
    for row in (0, 66, 68, 69):
        distances = np.linalg.norm(coordinates[distinct] - coordinates[row], axis=1)
        others = distinct != store.groups[row]
        order = np.argsort(distances[others], kind="stable")[:32]
        found = store.neighbors(store.ids[row])
        assert found.rows.tolist() == distinct[others][order].tolist()
        assert found.ids == tuple(store.ids[neighbor] for neighbor in found.rows)
        np.testing.assert_allclose(found.distances, distances[others][order], rtol=1e-6)
    nearest = neighbors_of(finished_store, store.ids[0], count=3)
    assert [item.row for item in nearest] == store.neighbors(store.ids[0]).rows[:3].tolist()
    assert nearest[0].text == store.prompts.sample([nearest[0].row])[0].rendered


@pytest.mark.parametrize(("k", "gamma"), [(10, 1.0), (3, 1.0), (32, 2.5)])
def test_weights_can_be_made_again_from_what_is_stored(k: int, gamma: float, store: Path) -> None:
    """Oracle: the mean of the k nearest distances in float64, shared by the rows of a vector, to the power gamma."""
    before = snapshot(store)
    metadata = recompute_weights(store, WeightingConfig(k=k, gamma=gamma), name="other")
    opened = open_store(store)
    distances = np.asarray(opened.neighbor_distances, dtype=np.float64)[:, :k].mean(axis=1)
    expected = np.maximum(distances, 1e-3) ** gamma / np.bincount(opened.groups, minlength=NUM_ROWS)[opened.groups]
    np.testing.assert_allclose(opened.named_weights("other"), expected / expected.sum(), rtol=1e-5)
    assert metadata == opened.named_metadata("other")
    assert metadata["weighting"] == {
        "weighting": "inverse-density",
        "k": k,
        "gamma": gamma,
        "target_ess": None,
        "uniform_mix": 0.0,
        "max_ratio": 10.0,
        "duplicates": "collapse",
    }
    # a name of its own leaves everything else as it was
    after = snapshot(store)
    assert {name for name in before if after[name] != before[name]} <= {"manifest.json"}
    assert verify(store).findings == []


def test_new_default_weights_replace_the_old_which_stay_by_name(store: Path) -> None:
    mapped = open_store(store).weights
    old = np.array(mapped)
    (old_name,) = {path.stem for path in (store / "weights").iterdir()}
    recompute_weights(store, WeightingConfig(gamma=3))
    after = open_store(store)
    assert not np.array_equal(after.weights, old)
    assert np.array_equal(np.load(store / "density_weights.npy"), after.weights)
    assert json.loads((store / "embeddings_metadata.json").read_bytes()) == after.metadata
    assert len(list((store / "weights").iterdir())) == 4
    assert np.array_equal(mapped, old), "who mapped the old weights keeps them"
    assert np.array_equal(after.named_weights(f"default@{old_name}"), old)
    recompute_weights(store, CONFIG.weighting)
    assert np.array_equal(open_store(store).weights, old)


def test_names_are_kept_also_when_they_are_replaced(store: Path) -> None:
    recompute_weights(store, WeightingConfig(gamma=2), name="sharp")
    recompute_weights(store, WeightingConfig(weighting="uniform"), name="flat")
    replaced = f"sharp@{inspect(store).names['sharp']}"
    recompute_weights(store, WeightingConfig(gamma=4), name="sharp")
    opened = open_store(store)
    assert set(inspect(store).names) == {"default", "sharp", "flat", replaced}
    assert [opened.named_metadata(name)["weighting"]["gamma"] for name in ("sharp", replaced)] == [4, 2]
    assert len(list((store / "weights").iterdir())) == 8
    with pytest.raises(ConfigError, match="default, flat, sharp"):
        opened.named_weights("none")
    for name in ("", "a/b"):
        with pytest.raises(ConfigError, match="name"):
            recompute_weights(store, WeightingConfig(), name=name)


def test_new_weights_never_come_from_damaged_distances(store: Path) -> None:
    digest = json.loads((store / "manifest.json").read_bytes())["neighbors"]
    path = store / "neighbors" / digest / "distances.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    before = snapshot(store)
    with pytest.raises(CorruptStoreError, match=r"distances\.npy has sha256") as caught:
        recompute_weights(store, WeightingConfig(gamma=2))
    assert "--repair" in str(caught.value.hint)
    assert snapshot(store) == before


def test_weights_are_named_by_what_they_hold(small_prompts: Path, store: Path) -> None:
    """A sidecar that would differ (here: drift on a finished store) never overwrites one that the manifest lists."""
    config = dataclasses.replace(with_embedding(threads=2), allow_drift=True)
    build_small(small_prompts, store, config=config)
    assert verify(store).findings == []


def test_an_export_to_numpy_has_one_row_a_line(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    paths = export_store(store, tmp_path / "out", format="npy")
    assert [path.name for path in paths] == ["embeddings.npy", "ids.json"]
    rows = np.asarray(opened.line_rows)
    rows = rows[rows >= 0]
    embeddings = np.load(paths[0])
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings, expected_rows(opened)[rows].astype(np.float32))
    assert json.loads(paths[1].read_bytes()) == [opened.ids[row] for row in rows]


def test_an_export_for_kat_adds_weights_that_sum_to_one_over_lines(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    paths = {path.name: path for path in export_store(store, tmp_path / "out", format="kat")}
    assert sorted(paths) == sorted(path.name for path in (tmp_path / "out").iterdir())
    rows = np.asarray(opened.line_rows)
    rows = rows[rows >= 0]
    weights = np.load(paths["density_weights.npy"])
    assert (weights.dtype, weights.shape) == (np.float32, (72,))
    assert abs(weights.sum(dtype=np.float64) - 1) <= 1e-6
    summed = np.bincount(rows, weights=weights)
    np.testing.assert_allclose(summed, opened.weights, rtol=1e-5)
    texts = json.loads(paths["prompts_list.json"].read_bytes())
    assert texts == [prompt.rendered for prompt in opened.prompts.sample(rows.tolist())]
    metadata = json.loads(paths["embeddings_metadata.json"].read_bytes())
    assert (metadata["n_prompts"], metadata["n_items"], metadata["embedding_dim"]) == (72, 72, DIMENSION)
    assert (metadata["embedding_dtype"], metadata["weights_dtype"]) == ("float32", "float32")
    assert metadata["weights_mean"] == pytest.approx(float(weights.mean()), rel=1e-5)
    assert metadata["weights_std"] == pytest.approx(float(weights.std()), rel=1e-4)


def test_an_export_never_overwrites(store: Path, tmp_path: Path) -> None:
    (tmp_path / "embeddings.npy").write_text("mine")
    with pytest.raises(StoreExistsError, match=r"embeddings\.npy exists"):
        export_store(store, tmp_path)
    assert (tmp_path / "embeddings.npy").read_text() == "mine"
    assert not (tmp_path / "ids.json").exists()


def test_a_failed_row_keeps_its_number_without_a_vector(tmp_path: Path) -> None:
    lines = [{"prompt": f"prompt {row}" if row != 20 else "FAIL"} for row in range(40)]
    prompts = write_lines(tmp_path / "prompts.jsonl", lines)
    config = dataclasses.replace(with_weighting(k=5), on_error="quarantine")
    build(prompts, out=tmp_path / "store", config=config, source=FakeSource())
    store = open_store(tmp_path / "store")
    assert store.num_rows == 40
    assert [failed.row for failed in store.journal.failed] == [20]
    assert np.isnan(store.rows([store.ids[20]])).all()
    assert np.isnan(store.coordinates[20]).all()
    assert (store.neighbor_ids[20] == -1).all()
    assert np.isposinf(store.neighbor_distances[20]).all()
    assert store.groups[20] == -1
    assert store.weights[20] == 0
    assert (np.delete(store.weights, 20) > 0).all()
    assert not (np.asarray(store.neighbor_ids) == 20).any(), "it is nobody's neighbour"
    assert store.metadata["failed_rows"] == inspect(tmp_path / "store").failed_rows == 1
    assert verify(tmp_path / "store").findings == []


@pytest.mark.parametrize("format", ["npy", "kat", "parquet"])
def test_an_export_that_fails_at_any_file_can_be_run_again(format: Any, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with SystemCalls(root=tmp_path / "new").watching() as seen:
        files = export_store(store, out, format=format)
    shutil.rmtree(tmp_path / "new")
    points = [at for at, call in enumerate(seen.calls, start=1) if call.name == "rename"]
    assert len(points) == len(files)
    for point in points:
        with (
            SystemCalls(root=tmp_path / "new", fail_at=point, error=errno.ENOSPC).watching(),
            pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)),
        ):
            export_store(store, out, format=format)
        assert not (tmp_path / "new").exists()
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    with SystemCalls(root=out, fail_at=2, error=errno.EIO).watching(), pytest.raises(StorageError):
        export_store(store, out, format=format)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert export_store(store, out, format=format) == files


def test_an_export_larger_than_the_disk_is_refused_before_a_byte_is_written(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * 72 * DIMENSION
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
        if free < needed:
            with pytest.raises(BudgetError, match="would have"):
                export_store(store, tmp_path / "out")
            assert not (tmp_path / "out").exists()
        else:
            export_store(store, tmp_path / "out")
