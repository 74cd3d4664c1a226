"""``embstore import``: rows and weights against float64 numpy, interruption, other input, failed rows, refusals, memory."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from typer.testing import CliRunner, Result

import embstore
from embstore.cli import app
from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig
from embstore.core.errors import ArrayError, IdentityMismatchError, PromptError, RowError
from embstore.core.events import Event, RowsCommitted
from embstore.core.rows import RowRange
from embstore.core.spec import Versions
from embstore.host.memory import read_memory
from embstore.model import range_finder
from embstore.training import load_weights
from tests.support.stores import snapshot
from tests.unit.test_prompt_inputs import pipe

ROWS, COLUMNS = 150, 40
CONFIG = BuildConfig(embedding=EmbeddingConfig(chunk_rows=16, window_rows=32, threads=1), density=DensityConfig(knn="exact"))


def make_rows(count: int = ROWS, columns: int = COLUMNS, *, rank: int = 12, seed: int = 0) -> NDArray[np.float64]:
    """Rows of very different length in a subspace, as embeddings of a narrow model are; row 9 is a copy of row 4."""
    random = np.random.default_rng(seed)
    rows = (random.standard_normal((count, rank)) + 2) @ random.standard_normal((rank, columns))
    rows *= 10 ** random.uniform(-3, 3, (count, 1))
    rows[9] = rows[4]
    return rows


def unit(rows: NDArray[Any]) -> NDArray[np.float64]:
    double = rows.astype(np.float64)
    return double / np.linalg.norm(double, axis=1, keepdims=True)


def save(path: Path, rows: NDArray[Any]) -> Path:
    """A .npy file, or by its name a Zarr array of version 2 or 3 in chunks that divide neither side."""
    if path.suffix == ".npy":
        np.save(path, rows)
        return path
    version = 2 if path.suffix == ".zarr2" else 3
    array = zarr.create_array(path, shape=rows.shape, chunks=(37, 23), dtype=rows.dtype, zarr_format=version)
    array[:] = rows
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("suffix", [".npy", ".zarr2", ".zarr3"])
def test_rows_coordinates_and_weights_are_those_of_the_unit_rows(suffix: str, dtype: str, tmp_path: Path) -> None:
    if suffix == ".zarr3" and dtype == ">f4":
        dtype = "float32"  # version 3 has a byte order in its codecs, zarr writes little
    given = make_rows().astype(dtype)
    embstore.import_array(save(tmp_path / f"rows{suffix}", given), out=tmp_path / "store", config=CONFIG)
    store = embstore.open_store(tmp_path / "store")
    expected = unit(given)
    assert store.ids == tuple(str(row) for row in range(ROWS))
    stored = store.rows(store.ids)
    # half a unit in the last place of float16, and its smallest number for tiny values
    np.testing.assert_allclose(stored.astype(np.float64), expected, rtol=2**-11 * 1.001, atol=2**-25)
    image = store.coordinates.astype(np.float64) @ np.load(tmp_path / "store" / "basis.npy").astype(np.float64).T
    residual = np.linalg.norm(stored.astype(np.float64) - image, axis=1)
    np.testing.assert_allclose(store.residuals, residual, rtol=1e-3, atol=1e-6)
    assert residual.max() < 5e-4
    assert store.spec.embedding.rank == 12
    distinct, inverse, counts = np.unique(expected, axis=0, return_inverse=True, return_counts=True)
    mean = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(distinct).kneighbors()[0].mean(axis=1)
    weights = (mean / counts)[inverse]
    np.testing.assert_allclose(store.weights, weights / weights.sum(), rtol=2e-3)
    assert store.metadata["vector_groups"] == {"groups": 1, "rows": 2}
    assert load_weights(tmp_path / "store", expect_len=ROWS).array.sum() == pytest.approx(1)
    assert store.spec.embedding.dtype == np.dtype(dtype).newbyteorder("=").name
    report = embstore.verify(tmp_path / "store")
    assert (report.is_complete, report.findings, report.notes) == (True, [], [])


def test_equal_values_are_one_identity_whatever_holds_them(tmp_path: Path) -> None:
    given = make_rows().astype(np.float32)
    files = [save(tmp_path / name, given) for name in ("a.npy", "a.zarr2", "a.zarr3")]
    files.append(save(tmp_path / "big.npy", given.astype(">f4")))
    snapshots = []
    for position, file in enumerate(files):
        out = tmp_path / str(position)
        embstore.import_array(file, out=out, config=CONFIG)
        found = snapshot(out)
        snapshots.append({name: found[name] for name in ("coordinates.npy", "basis.npy", "ids.json", "prompts.jsonl")})
        # the store goes on from any of the others
        embstore.import_array(files[position - 1], out=out, config=CONFIG, resume=True)
    assert all(each == snapshots[0] for each in snapshots)
    assert embstore.open_store(tmp_path / "0").spec.model.name == "a.npy"


def test_an_import_records_the_versions_that_decide_its_rows_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array, store = save(tmp_path / "rows.npy", make_rows()), tmp_path / "store"

    def stop(event: Event) -> None:
        if isinstance(event, RowsCommitted):
            raise KeyError

    with pytest.raises(KeyError):
        embstore.import_array(array, out=store, config=CONFIG, observer=stop)
    versions = embstore.open_store(store, partial=True).spec.embedding.versions
    assert versions == Versions(embstore=embstore.__version__, torch=torch.__version__)
    monkeypatch.setattr(torch, "__version__", "9")
    with pytest.raises(IdentityMismatchError, match=r"versions\.torch: the store has .*, given 9"):
        embstore.import_array(array, out=store, config=CONFIG, resume=True)
    monkeypatch.undo()
    embstore.import_array(array, out=store, config=CONFIG, resume=True)


@pytest.mark.parametrize("suffix", [".npy", ".zarr3"])
def test_an_interrupted_import_ends_as_an_uninterrupted_one(suffix: str, tmp_path: Path) -> None:
    array = save(tmp_path / f"rows{suffix}", make_rows().astype(np.float32))
    ids = tmp_path / "ids.txt"
    ids.write_text("".join(f"name {row}\n" for row in range(ROWS)))
    embstore.import_array(array, ids=ids, out=tmp_path / "whole", config=CONFIG)
    seen: list[tuple[int, int]] = []

    class Stopped(Exception):
        pass

    def stop_after_two(event: Event) -> None:
        if isinstance(event, RowsCommitted):
            seen.append((event.start, event.stop))
            if len(seen) == 2:
                raise Stopped

    with pytest.raises(Stopped):
        embstore.import_array(array, ids=ids, out=tmp_path / "stopped", config=CONFIG, observer=stop_after_two)
    info = embstore.inspect(tmp_path / "stopped")
    assert (info.committed_rows, info.total_rows, info.is_complete) == (64, ROWS, False)
    # without --ids: as they are called in the store
    embstore.import_array(array, out=tmp_path / "stopped", config=CONFIG, resume=True, observer=stop_after_two)
    assert seen == [(0, 32), (32, 64), (64, 96), (96, 128), (128, 150)]
    assert snapshot(tmp_path / "stopped") == snapshot(tmp_path / "whole")


@pytest.mark.slow  # a build is killed in test_build.py, an import interrupted above
def test_a_killed_import_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    array = save(tmp_path / "rows.npy", make_rows(3000, 600).astype(np.float16))
    command = [sys.executable, "-m", "embstore", "import", str(array), "--chunk-rows", "16", "--window-rows", "16"]
    command += ["--threads", "1", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    with subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        committed = next(line for line in process.stderr if "committed" in line)
        process.send_signal(signal.SIGKILL)
    assert committed
    assert process.returncode == -signal.SIGKILL
    assert not embstore.inspect(tmp_path / "killed").is_complete
    subprocess.run([*command, str(tmp_path / "killed"), "--resume"], check=True, capture_output=True)
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


def test_another_array_or_other_ids_are_refused_by_name(tmp_path: Path) -> None:
    rows = make_rows().astype(np.float32)
    array = save(tmp_path / "rows.npy", rows)
    embstore.import_array(array, out=tmp_path / "store", config=CONFIG)
    before = snapshot(tmp_path / "store")
    changed = rows.copy()
    changed[149, 39] = np.nextafter(changed[149, 39], np.float32(9))
    with pytest.raises(IdentityMismatchError, match=r"model\.weights_sha256: the store has .*, given "):
        embstore.import_array(save(tmp_path / "b.npy", changed), out=tmp_path / "store", config=CONFIG, resume=True)
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([str(row) for row in range(ROWS - 1)] + ["other"]))
    with pytest.raises(IdentityMismatchError, match=r"(?s)row 149: the store has .*149.*, given .*other"):
        embstore.import_array(array, ids=ids, out=tmp_path / "store", config=CONFIG, resume=True)
    result = run("build", "--resume", "--out", tmp_path / "store", "--weighting", "uniform")
    assert result.exit_code == 0, result.stderr  # density alone needs no array
    assert snapshot(tmp_path / "store")["coordinates.npy"] == before["coordinates.npy"]


def test_rows_that_remain_are_not_asked_of_a_model(tmp_path: Path) -> None:
    array = save(tmp_path / "rows.npy", make_rows())
    embstore.import_array(array, out=tmp_path / "store", config=CONFIG)
    (tmp_path / "store" / "embeddings.zarr" / "c.3.0").write_bytes(b"damaged")
    whole = snapshot(tmp_path / "store")
    embstore.verify(tmp_path / "store", repair=True)
    result = run("build", "--resume", "--out", tmp_path / "store")
    assert result.exit_code == 2
    assert "is made from an array" in result.stderr
    assert "embstore import ARRAY --resume" in result.stderr
    embstore.import_array(array, out=tmp_path / "store", config=CONFIG, resume=True)
    assert {name for name, digest in snapshot(tmp_path / "store").items() if whole[name] != digest} == {
        "embeddings.zarr/c.3.0"
    }


def test_names_may_be_jsonl_with_prompts_and_every_row_keeps_its_place(tmp_path: Path) -> None:
    lines: list[object] = [{"id": f"a{row}", "prompt": "the same text", "src": "ab"[row % 2]} for row in range(ROWS)]
    lines[3] = {"id": 3}
    lines[4] = {"prompt": "no id"}
    lines[5] = {"id": "chat", "messages": [{"role": "user", "content": "hello"}]}
    lines[6] = "bare"
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps(line) + "\n" for line in lines))
    embstore.import_array(save(tmp_path / "rows.npy", make_rows()), ids=ids, out=tmp_path / "store", config=CONFIG)
    store = embstore.open_store(tmp_path / "store")
    assert store.ids == ("a0", "a1", "a2", "3", "4", "chat", "bare", *(f"a{row}" for row in range(7, ROWS)))
    texts = [prompt.rendered for prompt in store.prompts.read(RowRange(2, 8))]
    assert texts == ["the same text", "", "no id", "user: hello", "", "the same text"]
    assert np.array_equal(store.line_rows, np.arange(ROWS))
    assert (np.asarray(store.multiplicity) == 1).all()
    assert len(np.unique(store.keys)) == ROWS
    shares = embstore.inspect(tmp_path / "store", by="src").shares
    assert sum(share.rows for share in shares) == ROWS


BAD_ROWS = {7: np.nan, 40: np.inf, 41: 0.0}


@pytest.fixture
def bad_array(tmp_path: Path) -> Path:
    rows = make_rows().astype(np.float32)
    rows[7, 3], rows[40, 0], rows[41] = np.nan, np.inf, 0
    return save(tmp_path / "bad.npy", rows)


def test_a_row_that_is_none_stops_the_import_before_its_window(bad_array: Path, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"'7' \(row 7\) failed: a value is not finite") as caught:
        embstore.import_array(bad_array, out=tmp_path / "store", config=CONFIG)
    assert "--on-error quarantine" in str(caught.value.hint)
    assert embstore.inspect(tmp_path / "store").committed_rows == 0


def test_a_row_that_is_none_may_be_kept_empty(bad_array: Path, tmp_path: Path) -> None:
    result = run("import", bad_array, "--out", tmp_path / "store", "--on-error", "quarantine", "--knn", "exact", "--json")
    assert result.exit_code == 0, result.stderr
    store = embstore.open_store(tmp_path / "store")
    failed = np.isin(np.arange(ROWS), list(BAD_ROWS))
    assert [(row.row, row.reason) for row in store.journal.failed] == [
        (7, "a value is not finite"),
        (40, "a value is not finite"),
        (41, "every value is 0"),
    ]
    assert (np.asarray(store.weights)[failed] == 0).all()
    assert (np.asarray(store.weights)[~failed] > 0).all()
    assert np.isnan(store.rows(["7", "40", "41"])).all()
    assert json.loads(result.stdout)["metadata"]["failed_rows"] == 3
    assert embstore.verify(tmp_path / "store").findings == []


def test_an_array_of_nothing_usable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"none of 20 sampled rows of zeros\.npy has finite values"):
        embstore.import_array(save(tmp_path / "zeros.npy", np.zeros((20, 4))), out=tmp_path / "store")


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_the_length_of_a_row_changes_no_bit(scale: float, tmp_path: Path) -> None:
    rows = make_rows() * 2.0 ** round(np.log2(scale))
    embstore.import_array(save(tmp_path / "rows.npy", rows), out=tmp_path / "store", config=CONFIG)
    embstore.import_array(save(tmp_path / "plain.npy", make_rows()), out=tmp_path / "plain", config=CONFIG)
    for name in ("coordinates.npy", "residuals.npy", "embeddings.zarr/c.0.0"):
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_copies_are_bit_equal_wherever_they_stand(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((500, 333)).astype(np.float32)
    rows[::7] = rows[0]
    embstore.import_array(save(tmp_path / "rows.npy", rows), out=tmp_path / "store")
    groups = np.asarray(embstore.open_store(tmp_path / "store").groups)
    assert (groups[::7] == 0).all()
    assert len(np.unique(groups)) == 500 - len(rows[::7]) + 1


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 100, 40), (200, 8, 8), (190, 180, 180), (400, 320, 75)])
def test_the_basis_has_as_many_directions_as_it_takes(
    rows: int, columns: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last two need a larger sample than the first one."""
    monkeypatch.setattr(range_finder, "_FIRST_SAMPLE", 128)
    given = make_rows(rows, columns, rank=rank) if rank < min(rows, columns) else None
    if given is None:
        given = np.random.default_rng(0).standard_normal((rows, columns))
    config = BuildConfig(density=DensityConfig(knn="exact"))
    embstore.import_array(save(tmp_path / "rows.npy", given.astype(np.float32)), out=tmp_path / "store", config=config)
    store = embstore.open_store(tmp_path / "store")
    assert store.spec.embedding.rank == rank
    basis = np.load(tmp_path / "store" / "basis.npy").astype(np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=2e-6)
    assert np.max(store.residuals) < 5e-4


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, array: Path, match: str, *, ids: Path | None = None) -> None:
    """Refused with its reason and a next step, as one short message, and no row was written."""
    arguments: list[object] = ["import", array, "--out", tmp_path / "store"]
    result = run(*arguments, *(["--ids", ids] if ids is not None else []))
    assert result.exit_code == 1, result.output
    assert match in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "store" / "spec.json").exists()


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (np.zeros(5), "has shape (5,)"),
        (np.zeros((2, 3, 4)), "has shape (2, 3, 4)"),
        (np.zeros((0, 4)), "has shape (0, 4)"),
        (np.zeros((3, 4), dtype=np.int64), "contains int64"),
        (np.asfortranarray(np.ones((3, 4))), "is in Fortran order"),
    ],
)
def test_an_array_that_is_no_rows_is_refused(rows: NDArray[Any], match: str, tmp_path: Path) -> None:
    refused(tmp_path, save(tmp_path / "rows.npy", rows), match)


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "missing.npy", "No such file")
    text = tmp_path / "text.npy"
    text.write_text("no array")
    refused(tmp_path, text, "is not a plain .npy array")
    os.mkfifo(tmp_path / "fifo")
    handle = os.open(tmp_path / "fifo", os.O_RDWR)  # so that opening it does not wait
    refused(tmp_path, tmp_path / "fifo", "is a pipe or device")
    os.close(handle)
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([[print]], dtype=object), allow_pickle=True)
    refused(tmp_path, pickled, "is an array of Python objects")
    cut = save(tmp_path / "cut.npy", np.ones((20, 8)))
    os.truncate(cut, cut.stat().st_size - 1)
    refused(tmp_path, cut, "but its header describes")
    empty = tmp_path / "folder"
    empty.mkdir()
    refused(tmp_path, empty, "is a folder without a Zarr array")


def _numpy(path: Path, rows: NDArray[Any], write: Callable[..., None] = np.save) -> None:
    with path.open("wb") as file:
        write(file, rows)


def _torch_file(path: Path, rows: NDArray[np.float32]) -> None:
    torch.save(torch.from_numpy(rows), path)


def _safetensors(path: Path, rows: NDArray[np.float32]) -> None:
    pytest.importorskip("safetensors.numpy").save_file({"embeddings": rows}, path)


def _parquet(path: Path, rows: NDArray[np.float32]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"embedding": pa.array(rows.tolist(), pa.list_(pa.float32()))}), path)


@pytest.mark.parametrize(
    ("write", "name", "hint"),
    [
        (lambda path, rows: _numpy(path, rows, np.savez), "is a NumPy archive (.npz)", "numpy.load"),
        (_torch_file, "is a PyTorch file, which embstore never unpickles", "weights_only=True"),
        (_safetensors, "is a safetensors file", "safetensors.numpy.load_file"),
        (_parquet, "is a Parquet file", "pyarrow.parquet.read_table"),
        (lambda path, rows: path.write_bytes(gzip.compress(rows.tobytes())), "is a gzip stream", "gzip -d"),
        (lambda path, rows: _numpy(path, rows.astype(object)), "an array of Python objects", "numpy.stack"),
        (lambda path, rows: _numpy(path, rows.astype("f2").view("V2")), "(|V2)", "ml_dtypes.bfloat16"),
        (lambda path, rows: _numpy(path, rows.view([("a", "f4")])), "is not a plain .npy", "structured"),
        (lambda path, rows: path.write_bytes(rows.tobytes()), "is not a plain .npy array", "raw numbers have no shape"),
    ],
    ids=["npz", "pt", "safetensors", "parquet", "gzip", "object", "void", "structured", "raw"],
)  # fmt: skip
def test_what_is_no_array_is_named_with_its_conversion(write: Any, name: str, hint: str, tmp_path: Path) -> None:
    write(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32))
    refused(tmp_path, tmp_path / "rows.npy", name)
    assert hint in run("import", tmp_path / "rows.npy", "--out", tmp_path / "store").stderr.replace("\n", " ")


def _stored(source: Path, out: Path) -> dict[str, str]:
    embstore.import_array(source, out=out, config=CONFIG)
    found = snapshot(out)
    found.pop("spec.json"), found.pop("manifest.json"), found.pop("embeddings_metadata.json")  # the name of the array
    return {
        name: digest for name, digest in found.items() if not name.startswith("weights/") and name != "density_weights.npy"
    }


def test_bfloat16_rows_are_their_values(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rows = make_rows().astype(ml_dtypes.bfloat16)
    found = _stored(save(tmp_path / "half.npy", rows), tmp_path / "a")
    assert found == _stored(save(tmp_path / "whole.npy", rows.astype(np.float32)), tmp_path / "b")


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_folder_of_shards_is_one_array(dtype: str, tmp_path: Path) -> None:
    """In the order of the numbers in their names; files without rows and other files do not matter."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rows = make_rows().astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    folder = tmp_path / "parts"
    folder.mkdir()
    cuts = [0, 7, 20, 20, 33, 60, 61, 80, 90, 95, 99, 100, len(rows)]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        save(folder / f"emb_{number}.npy", rows[start:stop])  # emb_10 comes after emb_9
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    found = _stored(folder, tmp_path / "a")
    assert found == _stored(save(tmp_path / "whole.npy", rows), tmp_path / "b")


def test_a_folder_of_unlike_shards_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    save(folder / "emb_0.npy", np.ones((3, 4), dtype=np.float32))
    save(folder / "emb_1.npy", np.ones((3, 5), dtype=np.float32))
    refused(tmp_path, folder, "emb_1.npy has 5 columns of float32, emb_0.npy has 4 of float32")
    save(folder / "emb_1.npy", np.ones((3, 4), dtype=np.float16))
    refused(tmp_path, folder, "emb_1.npy has 4 columns of float16, emb_0.npy has 4 of float32")
    save(folder / "emb_1.npy", np.ones((0, 4), dtype=np.float32))
    save(folder / "text_0.npy", np.ones((3, 4), dtype=np.float32))
    refused(tmp_path, folder, "contains files of several arrays: emb_#.npy, text_#.npy")


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_headers_of_later_versions_are_read(version: tuple[int, int], tmp_path: Path) -> None:
    rows = make_rows().astype(np.float32)
    with (tmp_path / "later.npy").open("wb") as file:
        np.lib.format.write_array(file, rows, version=version)
    assert _stored(tmp_path / "later.npy", tmp_path / "a") == _stored(save(tmp_path / "whole.npy", rows), tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "lost", "named"),
    [
        ({"zarr_format": 2, "chunks": (16, 16)}, "2.0", "chunk 2.0 (rows 32 to 47)"),
        ({"zarr_format": 2, "chunks": (16, 5)}, "1.2", "chunk 1.2 (rows 16 to 31)"),
        ({"zarr_format": 3, "chunks": (16, 16)}, "c/3/0", "chunk c/3/0 (rows 48 to 59)"),
        ({"zarr_format": 3, "chunks": (8, 4), "shards": (32, 16)}, "c/1/0", "chunk c/1/0 (rows 32 to 59)"),
    ],
)
def test_a_chunk_that_is_missing_is_named(options: dict[str, Any], lost: str, named: str, tmp_path: Path) -> None:
    """zarr reads it as zeros; with chunks of some columns, rows would be wrong without a word."""
    rows = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    array = zarr.create_array(tmp_path / "rows", shape=rows.shape, dtype=rows.dtype, **options)
    array[:] = rows
    embstore.import_array(tmp_path / "rows", out=tmp_path / "whole", config=CONFIG)
    (tmp_path / "rows" / lost).unlink()
    refused(tmp_path, tmp_path / "rows", f"lacks {named}")


@pytest.mark.parametrize("location", ["start", "end"])
def test_a_chunk_that_its_shard_lacks_is_named(location: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    codec = zarr.codecs.ShardingCodec(chunk_shape=(8, 4), index_location=location)
    array = zarr.create_array(
        tmp_path / "rows", shape=rows.shape, dtype=rows.dtype, chunks=(32, 16), serializer=codec, compressors=None
    )
    array[:32] = rows[:32]
    array[32:, :8] = rows[32:, :8]
    array[32:, 12:] = rows[32:, 12:]
    refused(tmp_path, tmp_path / "rows", "lacks chunk 0/2 of shard c/1/0 (rows 32 to 59)")
    array[:] = rows
    embstore.import_array(tmp_path / "rows", out=tmp_path / "whole", config=CONFIG)  # beyond row 59 chunks need not be there


@pytest.mark.parametrize("form", ["pipe", "gzip pipe", "fifo", "array"])
def test_names_may_come_through_a_pipe(form: str, tmp_path: Path) -> None:
    array = save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((30, 8)))
    content = "".join(f"name {row}\n" for row in range(30)).encode()
    if form == "array":
        content = json.dumps([f"name {row}" for row in range(30)], indent=1).encode()
    ids: Path | str = tmp_path / "ids"
    with contextlib.ExitStack() as closing:
        if "pipe" in form:
            ids = closing.enter_context(pipe(gzip.compress(content) if "gzip" in form else content, [1, 2, 7]))
        elif form == "fifo":
            os.mkfifo(ids)
            feeder = threading.Thread(target=lambda: Path(ids).write_bytes(content))
            feeder.start()
            closing.callback(feeder.join)
        else:
            Path(ids).write_bytes(content)
        embstore.import_array(array, ids=ids, out=tmp_path / "store", config=CONFIG)
    assert embstore.open_store(tmp_path / "store").ids == tuple(f"name {row}" for row in range(30))


def test_the_shell_hands_over_pipes(tmp_path: Path) -> None:
    """``<(...)`` of bash, once for the names of an import and once for the dataset of a resample."""
    save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((30, 8)))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"uid": f"{row}", "n": row}) + "\n" for row in range(1, 31)))
    script = """
    set -e
    "$PYTHON" -m embstore import rows.npy --ids <(seq 1 30) --out store
    "$PYTHON" -m embstore resample store --id-column uid --dataset <(gzip -c data.jsonl) --out a.jsonl
    "$PYTHON" -m embstore resample store --id-column uid --dataset data.jsonl --out b.jsonl
    gzip -c data.jsonl | "$PYTHON" -m embstore resample store --id-column uid --dataset - --out c.jsonl
    """
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert embstore.open_store(tmp_path / "store").ids == tuple(str(row) for row in range(1, 31))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 30


def test_names_of_a_table_are_read(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    array = save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((3, 8)))
    for name, ids in {"text": ["a", "b", "c"], "binary": pa.array([b"a", b"b", b"c"], pa.binary())}.items():
        pq.write_table(pa.table({"id": ids, "src": ["x"] * 3}), tmp_path / name)
        embstore.import_array(array, ids=tmp_path / name, out=tmp_path / f"{name}-store")
        store = embstore.open_store(tmp_path / f"{name}-store")
        assert store.ids == ("a", "b", "c")


def test_zarr_that_is_no_array_of_numbers_is_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "group")
    refused(tmp_path, tmp_path / "group", "is a Zarr group")
    array = save(tmp_path / "rows.zarr2", np.ones((20, 8)))
    metadata = json.loads((array / ".zarray").read_text())
    (array / ".zarray").write_text(json.dumps(metadata | {"filters": [{"id": "pickle"}]}))
    refused(tmp_path, array, "uses 'pickle', which embstore does not run")
    (array / ".zarray").write_text(json.dumps(metadata | {"chunks": "no"}))
    refused(tmp_path, array, "zarr cannot open")
    (array / ".zarray").write_text("{")
    refused(tmp_path, array, ".zarray")
    three = save(tmp_path / "rows.zarr3", np.ones((20, 8)))
    codecs = json.loads((three / "zarr.json").read_text())
    inner = {"name": "sharding_indexed", "configuration": {"codecs": [{"name": "numcodecs.pickle"}], "chunk_shape": [1, 1]}}
    (three / "zarr.json").write_text(json.dumps(codecs | {"codecs": [inner]}))
    refused(tmp_path, three, "uses 'numcodecs.pickle'")


def test_a_damaged_zarr_chunk_is_refused(tmp_path: Path) -> None:
    array = save(tmp_path / "rows.zarr2", np.random.default_rng(0).standard_normal((40, 8)))
    chunk = next(path for path in array.iterdir() if path.name == "0.0")
    chunk.write_bytes(b"\x02\x01\x21\x08 not a chunk at all, only so long")
    refused(tmp_path, array, "cannot be read")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("short.txt", "a\nb\n", "names 2 rows, the array has 3"),
        ("long.txt", "a\nb\nc\nd\n", "names 4 rows, the array has 3"),
        ("twice.txt", "a\nb\na\n", "id 'a' names two rows, 0 and 2"),
        ("gap.txt", "a\n\nc\n", "line 2 of {ids} does not name a row: the id is empty"),
        ("short.json", '["a", "b"]', "names 2 rows, the array has 3"),
        ("types.json", '["a", "b", null]', "line 3 of {ids} does not name a row: not a JSON object but NoneType"),
        ("broken.json", '["a", "b"', "is not valid JSON: element 2 is followed by neither a comma nor the end"),
        ("broken.jsonl", '{"id": "a"}\n{"id": \n{"id": "c"}\n', "line 2 of {ids} does not name a row: not JSON"),
        ("number.jsonl", '{"id": "2"}\n{"id": "b"}\n{"prompt": "x"}\n', "id '2' names two rows, 0 and 2"),
        ("gap.csv", "id,src\na,x\n,y\nc,z\n", "line 3 of {ids} does not name a row: the id is missing"),
        ("wide.tsv", "id\tsrc\na\tx\nb\nc\ty\n", "line 3 of {ids} does not name a row: 1 values"),
        ("bare.csv", "r0\nr1\nr2\nr3\n", "bare.csv has neither a column id nor a prompt; its columns are 'r0'"),
        ("other.tsv", "name\tn\na\t1\nb\t2\nc\t3\n", "neither a column id nor a prompt; its columns are 'name', 'n'"),
        ("empty.txt", "", "names 0 rows, the array has 3"),
    ],
)
def test_names_that_do_not_fit_the_rows_are_refused(name: str, content: str, match: str, tmp_path: Path) -> None:
    ids = tmp_path / name
    ids.write_text(content)
    refused(
        tmp_path,
        save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((3, 4))),
        match.replace("{ids}", str(ids)),
        ids=ids,
    )


def test_errors_are_of_their_kind(tmp_path: Path) -> None:
    with pytest.raises(ArrayError, match="No such file"):
        embstore.import_array(tmp_path / "none.npy", out=tmp_path / "store")
    array = save(tmp_path / "rows.npy", np.ones((3, 4)))
    with pytest.raises(PromptError, match="cannot read prompts"):
        embstore.import_array(array, ids=tmp_path / "none.txt", out=tmp_path / "store")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(read_memory() is None, reason="the kernel does not tell anonymous memory (not Linux)")
@pytest.mark.parametrize("suffix", [".npy", pytest.param(".zarr3", marks=pytest.mark.slow)])
def test_an_import_stays_under_its_budget(suffix: str, tmp_path: Path) -> None:
    budget_mib, rows, columns = 160, 3000, 20_000
    random = np.random.default_rng(0)
    left, right = random.standard_normal((rows, 60)), random.standard_normal((60, columns))
    path = tmp_path / f"rows{suffix}"
    if suffix == ".npy":
        array: Any = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, columns))
    else:
        array = zarr.create_array(path, shape=(rows, columns), chunks=(100, columns), dtype="f2")
    for start in range(0, rows, 500):  # 114 MiB in all
        array[start : start + 500] = left[start : start + 500] @ right
    del array
    command = [sys.executable, "-m", "embstore", "import", path, "--out", tmp_path / "store"]
    command += ["--memory-budget", f"{budget_mib}MiB", "--json"]
    result = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 0 < json.loads(result.stdout)["peak_anonymous_bytes"] <= budget_mib << 20


def test_zarr_chunks_that_hold_every_row_are_refused_under_a_small_budget(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "tall", shape=(4000, 800), chunks=(4000, 8), dtype="f4")
    array[:1] = 1
    result = run("import", tmp_path / "tall", "--out", tmp_path / "store", "--memory-budget", "64MiB")
    assert result.exit_code == 1
    assert "reading tall by its chunks needs 97.7 MiB, --memory-budget is 64.0 MiB" in result.stderr
    assert "--memory-budget 98MiB or more" in result.stderr
