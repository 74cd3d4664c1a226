"""A neighbour search that is killed goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embstore.storage.search_blocks import SearchBlocks

# Forks a child for each line of standard input, and says how it ended. A child searches points in blocks of 500 nodes and
# writes how many graphs it built; SIGKILL when it has kept block number ``kill``.
SERVER = """
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
from embstore.search import graph, node_search
from embstore.search.exact import scan
from embstore.search.hnsw import shards
from embstore.search.graph import build_graph
from embstore.core.config import DensityConfig
from embstore.core.events import ignore
from embstore.storage.search_blocks import SearchBlocks

shards.BLOCK_ROWS = graph.BLOCK_ROWS = 500
plan = scan.ScanPlan(tile_rows=512, panel_rows=10_000, memory_bytes=0)
scan.plan_scan = lambda *_, **__: plan
graphs, build = [], shards.build_index
shards.build_index = lambda coord_GR, nodes, *rest: graphs.append(len(nodes)) or build(coord_GR, nodes, *rest)

def search(method, folder, kill):
    class Blocks(SearchBlocks):
        saved = 0
        def save(self, name, arrays):
            super().save(name, arrays)
            Blocks.saved += 1
            if Blocks.saved == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    points = np.random.default_rng(0).standard_normal((6000, 12)).astype(np.float32)
    graph = build_graph(
        points, np.zeros(6000, dtype=np.bool_), DensityConfig(knn=method, shards=3 if method == "hnsw" else None),
        threads=1, memory_bytes=1 << 30, work=folder, observer=ignore,
        kept=Blocks(folder, "a" * 64),
    )
    np.save(folder / "result.npy", np.concatenate([graph.ids_NK.view(np.float32), graph.distances_NK], axis=1))
    (folder / "said.json").write_text(json.dumps({"graphs": len(graphs), "saved": Blocks.saved}))

for line in sys.stdin:
    method, folder, kill = json.loads(line)
    child = os.fork()
    if child == 0:
        search(method, Path(folder), kill)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Search = Callable[..., dict[str, Any] | None]


@pytest.fixture(scope="module")
def search() -> Iterator[Search]:
    """Run a search in a process of its own: what it said, None when it was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(method: str, folder: Path, *, kill: int = 0) -> dict[str, Any] | None:
            assert server.stdin is not None
            assert server.stdout is not None
            folder.mkdir(exist_ok=True)
            print(json.dumps([method, str(folder), kill]), file=server.stdin, flush=True)
            assert int(server.stdout.readline()) == (-signal.SIGKILL if kill else 0)
            return None if kill else dict(json.loads((folder / "said.json").read_text()))

        yield run
        server.stdin.close()


def result(folder: Path) -> bytes:
    return (folder / "result.npy").read_bytes()


@pytest.fixture(scope="module", params=["hnsw", "exact"])
def uninterrupted(
    request: pytest.FixtureRequest, search: Search, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, int]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    said = search(request.param, folder)
    assert said is not None
    assert said["saved"] == {"hnsw": 3 * 12, "exact": 12}[request.param]  # 12 blocks, for each of three graphs
    return request.param, folder, said["saved"]


@pytest.mark.parametrize("place", [0.6, pytest.param(0.1, marks=pytest.mark.faults)])
def test_a_killed_search_loses_at_most_a_graph_and_a_block(
    place: float, search: Search, uninterrupted: tuple[str, Path, int], tmp_path: Path
) -> None:
    method, whole, blocks = uninterrupted
    kill = max(1, int(place * blocks))
    assert search(method, tmp_path, kill=kill) is None
    said = search(method, tmp_path)
    assert said is not None
    assert said["saved"] == blocks - kill  # not one block is computed twice
    if method == "hnsw":
        assert said["graphs"] == 3 - kill // 12  # those whose answers are all kept are not built again
    assert result(tmp_path) == result(whole)


def test_torn_and_foreign_blocks_are_computed_again(
    search: Search, uninterrupted: tuple[str, Path, int], tmp_path: Path
) -> None:
    method, whole, blocks = uninterrupted
    assert search(method, tmp_path, kill=blocks - 1) is None
    kept = sorted(path for path in tmp_path.glob("search-*/*"))
    os.truncate(kept[0], kept[0].stat().st_size - 5)
    content = bytearray(kept[1].read_bytes())
    content[-100] ^= 1
    kept[1].write_bytes(content)
    folder = SearchBlocks(tmp_path, "a" * 64)
    folder.save(kept[2].name, {"ids": np.full((3, 32), 10**6, dtype=np.int32)})  # whole, but nothing of this search
    assert search(method, tmp_path) is not None
    assert result(tmp_path) == result(whole)


# --- the file of a block -------------------------------------------------------------------------------------------------


def arrays() -> dict[str, NDArray[Any]]:
    return {
        "ids": np.arange(6, dtype=np.int32).reshape(2, 3),
        "a": np.ones(6, dtype=np.float32),
        "b": np.zeros((0, 4), dtype=np.float32),
    }


def test_a_block_is_read_as_it_was_saved(tmp_path: Path) -> None:
    blocks = SearchBlocks(tmp_path, "a" * 64)
    assert blocks.load("one") is None
    blocks.save("one", arrays())
    found = SearchBlocks(tmp_path, "a" * 64).load("one")
    assert found is not None
    assert {name: (array.dtype, array.tolist(), array.shape) for name, array in found.items()} == {
        name: (array.dtype, array.tolist(), array.shape) for name, array in arrays().items()
    }


def test_another_search_finds_nothing_and_clears_the_disk(tmp_path: Path) -> None:
    SearchBlocks(tmp_path, "a" * 64).save("one", arrays())
    other = SearchBlocks(tmp_path, "b" * 64)
    assert other.load("one") is None
    assert list(tmp_path.glob("search-*")) == []


def test_no_damaged_block_is_ever_served(tmp_path: Path) -> None:
    blocks = SearchBlocks(tmp_path, "a" * 64)
    blocks.save("one", arrays())
    (path,) = tmp_path.glob("search-*/one")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert blocks.load("one") is None
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        found = blocks.load("one")
        # a flipped letter of an array's name is its consumer's to refuse
        assert found is None or all(array.tobytes() in {a.tobytes() for a in arrays().values()} for array in found.values())


def test_a_block_that_is_no_file_is_none_at_all(tmp_path: Path) -> None:
    blocks = SearchBlocks(tmp_path, "a" * 64)
    blocks.save("one", arrays())
    (path,) = tmp_path.glob("search-*/one")
    path.unlink()
    os.mkfifo(path)
    assert blocks.load("one") is None
    path.unlink()
    path.symlink_to("/dev/zero")
    assert blocks.load("one") is None
