"""Other readers of the array see the same bytes, and a chunk is the same bytes whoever encodes it, and when."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numcodecs.blosc
import numpy as np
import pytest
import tensorstore
import zarr
from numpy.typing import NDArray

from embstore.core.format import chunk_name
from embstore.storage.chunks import encode_chunk
from embstore.storage.reader import EmbeddingStore, open_store
from tests.support.build_fake import CONFIG
from tests.support.stores import build_small, with_embedding

pytestmark = pytest.mark.usefixtures("without_syncs")

COMPRESSORS = ("lz4", "none")
NEWEST = "EMBSTORE_NEWEST_ZARR_PYTHON"
# run by another interpreter, which has zarr and not this package
READ_WITH_ZARR = """
import hashlib, json, sys
import numpy, zarr
array = zarr.open_array(sys.argv[1], mode="r")
whole, part = numpy.asarray(array[:]), numpy.asarray(array[17:50, 3:9])
json.dump(
    {
        "zarr": zarr.__version__,
        "shape": array.shape,
        "chunks": array.chunks,
        "dtype": str(array.dtype),
        "whole": hashlib.sha256(whole.tobytes()).hexdigest(),
        "part": hashlib.sha256(numpy.ascontiguousarray(part).tobytes()).hexdigest(),
        "names": array.metadata.dimension_names,
    },
    sys.stdout,
)
"""


@pytest.fixture(scope="module", params=COMPRESSORS)
def built(request: pytest.FixtureRequest, small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """A finished store; read it, never write to it."""
    return _built(small_prompts, tmp_path_factory.mktemp(request.param) / "store", request.param)


def _built(prompts: Path, root: Path, compressor: str) -> EmbeddingStore:
    build_small(prompts, root, config=with_embedding(compressor=compressor))
    return open_store(root)


@pytest.fixture(scope="module")
def rows(built: EmbeddingStore) -> NDArray[np.float16]:
    """What the package's own reader serves, every chunk held against its commit."""
    return _rows(built)


def _rows(store: EmbeddingStore) -> NDArray[np.float16]:
    return np.concatenate([block for _, block in store.iter_rows()])


def _sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_zarr_reads_the_same_bytes(built: EmbeddingStore, rows: NDArray[np.float16]) -> None:
    array = zarr.open_array(built.root / "embeddings.zarr", mode="r")
    assert (array.shape, array.chunks, array.dtype) == (rows.shape, (CONFIG.embedding.chunk_rows, rows.shape[1]), np.float16)
    assert np.asarray(array[:]).tobytes() == rows.tobytes()
    for selection in (np.s_[0], np.s_[-1], np.s_[15:17], np.s_[::7], np.s_[64:, 5:9]):
        assert np.asarray(array[selection]).tobytes() == rows[selection].tobytes()
    assert np.isnan(array.fill_value)


def test_tensorstore_reads_the_same_bytes(built: EmbeddingStore, rows: NDArray[np.float16]) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{built.root / 'embeddings.zarr'}/"}}
    array = tensorstore.open(spec, open=True, read=True).result()
    assert array.shape == rows.shape
    assert np.asarray(array.read().result()).tobytes() == rows.tobytes()
    assert np.asarray(array[64:].read().result()).tobytes() == rows[64:].tobytes()


def test_rows_without_a_compressor_can_be_mapped(small_prompts: Path, tmp_path: Path) -> None:
    built = _built(small_prompts, tmp_path / "store", "none")
    rows = _rows(built)
    shape = (built.spec.chunk_rows, rows.shape[1])
    for index in range(-(-len(rows) // shape[0])):
        mapped = np.memmap(built.root / chunk_name(index), dtype="<f2", mode="r", shape=shape)
        expected = rows[index * shape[0] : (index + 1) * shape[0]]
        assert mapped[: len(expected)].tobytes() == expected.tobytes()


def test_the_newest_zarr_reads_the_same_bytes(built: EmbeddingStore, rows: NDArray[np.float16]) -> None:
    """Releases after 3.1 need Python 3.12 or later, so another interpreter reads."""
    python = os.environ.get(NEWEST)
    if not python:
        pytest.skip(f"set {NEWEST} to a Python 3.12+ interpreter that has the newest zarr")
    command = [python, "-I", "-c", READ_WITH_ZARR, str(built.root / "embeddings.zarr")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert tuple(map(int, found.pop("zarr").split(".")[:2])) >= (3, 2)
    assert found == {
        "shape": list(rows.shape),
        "chunks": [CONFIG.embedding.chunk_rows, rows.shape[1]],
        "dtype": "float16",
        "whole": _sha256(rows),
        "part": _sha256(rows[17:50, 3:9]),
        "names": ["row", "vocabulary"],
    }


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_zarr_itself_would_write_what_we_write(compressor: str, small_prompts: Path, tmp_path: Path) -> None:
    """From the same description and rows: the same file without a compressor, the same rows with one (blosc may vary)."""
    root = tmp_path / "store"
    build_small(small_prompts, root, config=with_embedding(compressor=compressor))
    store = open_store(root)
    copy = tmp_path / "copy.zarr"
    copy.mkdir()
    (copy / "zarr.json").write_bytes((root / "embeddings.zarr" / "zarr.json").read_bytes())
    array = zarr.open_array(copy, mode="r+", config={"write_empty_chunks": True})
    blosc = numcodecs.blosc.Blosc()
    array[:] = np.concatenate([block for _, block in store.iter_rows()])
    for index in range(5):
        ours, theirs = (root / chunk_name(index)).read_bytes(), (copy / f"c.{index}.0").read_bytes()
        if compressor == "none":
            assert ours == theirs
        else:  # four bytes of crc32c follow
            assert blosc.decode(ours[:-4]) == blosc.decode(theirs[:-4])


# --- one chunk, one file ----------------------------------------------------------------------------------------------


def _chunk_bytes(rows: NDArray[np.float16], compressor: str) -> bytes:
    return b"".join(encode_chunk(rows, chunk_rows=256, compressor=compressor)[0])


@pytest.fixture(scope="module")
def big_chunk() -> NDArray[np.float16]:
    """Rows enough (8 MB) that blosc would split them over threads if it were let."""
    rows = np.random.default_rng(0).standard_normal((250, 16384)).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def _in_a_thread(action: Callable[[], bytes]) -> bytes:
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(action()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_chunk_encoded_anywhere_at_any_time_is_the_same_bytes(compressor: str, big_chunk: NDArray[np.float16]) -> None:
    expected = _sha256(np.frombuffer(_chunk_bytes(big_chunk, compressor), dtype=np.uint8))
    found = []
    for turn in range(20):
        if turn % 2:
            encoded = _in_a_thread(lambda: _chunk_bytes(big_chunk, compressor))
        else:
            encoded = _chunk_bytes(big_chunk if turn % 4 else big_chunk.copy(), compressor)
        found.append(hashlib.sha256(encoded).hexdigest())
    assert found == [expected] * 20


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_chunk_encoded_by_many_threads_at_once_is_the_same_bytes(compressor: str, big_chunk: NDArray[np.float16]) -> None:
    """Main and worker threads together, some of them on other rows: no state is shared."""
    other = big_chunk[::-1].copy()
    expected = {id(array): hashlib.sha256(_chunk_bytes(array, compressor)).hexdigest() for array in (big_chunk, other)}
    with ThreadPoolExecutor(4) as pool:
        jobs = [(array, pool.submit(_chunk_bytes, array, compressor)) for array in (big_chunk, other) * 10]
        mine = [hashlib.sha256(_chunk_bytes(big_chunk, compressor)).hexdigest() for _ in range(3)]
        theirs = [(expected[id(array)], hashlib.sha256(job.result()).hexdigest()) for array, job in jobs]
    assert mine == [expected[id(big_chunk)]] * 3
    assert [found for _, found in theirs] == [wanted for wanted, _ in theirs]
