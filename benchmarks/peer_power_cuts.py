"""What a writer reported as written, after a power cut: embstore beside zarr's LocalStore and tensorstore.

``python -m benchmarks.peer_power_cuts`` (Linux, root, loop devices) writes ``benchmarks/results/peer_power_cuts.json``. Each
writer writes chunks one by one to a loop-mounted file system and says so after each; after a random number of them the file
system is shut down, mounted again (its log replayed), and every reported chunk is read back and compared.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import EmbstoreError
from embstore.core.rows import RowRange
from embstore.storage.reader import EmbeddingStore, open_store
from tests.support.disks import Kind, Log, new_disk
from tests.support.fake import FakeSource
from tests.support.stores import build_small, write_lines

RESULTS = Path(__file__).parent / "results" / "peer_power_cuts.json"
KINDS: tuple[Kind, ...] = ("ext4", "xfs")
WRITERS = ("zarr LocalStore", "tensorstore", "embstore")
NUM_CHUNKS, CHUNK_ROWS, DIMENSION = 40, 16, 2048


def expected(chunk: int) -> NDArray[np.float16]:
    """Rows of one chunk, the same in writer and judge."""
    return np.random.default_rng(chunk).standard_normal((CHUNK_ROWS, DIMENSION)).astype(np.float16)


def write(writer: str, path: Path) -> None:
    """Write every chunk, saying after each that it is written."""
    shape, chunk_shape = (NUM_CHUNKS * CHUNK_ROWS, DIMENSION), (CHUNK_ROWS, DIMENSION)
    if writer == "zarr LocalStore":
        import zarr  # noqa: PLC0415 - each writer needs only its own library

        array = zarr.create_array(
            zarr.storage.LocalStore(path), shape=shape, chunks=chunk_shape, dtype="float16", fill_value=float("nan")
        )
        for chunk in range(NUM_CHUNKS):
            array[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS] = expected(chunk)
            print(chunk, flush=True)
    elif writer == "tensorstore":
        import tensorstore  # noqa: PLC0415

        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path)},
            "metadata": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}},
            "create": True,
        }
        store = tensorstore.open(spec, dtype=tensorstore.float16, shape=shape).result()
        for chunk in range(NUM_CHUNKS):
            store[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS].write(expected(chunk)).result()
            print(chunk, flush=True)
    else:
        prompts = write_lines(
            path.with_name("prompts.jsonl"), [{"prompt": f"Explain number {n}."} for n in range(32 * NUM_CHUNKS)]
        )
        committed = iter(range(NUM_CHUNKS))

        def tell(event: object) -> None:
            if type(event).__name__ == "RowsCommitted":
                print(next(committed), flush=True)

        build_small(prompts, path, source=FakeSource(dimension=DIMENSION), observer=tell)


def lost(writer: str, path: Path, reported: int, whole: Path) -> int:
    """How many of the first ``reported`` chunks (for embstore: windows) are not there, or not as written."""
    if writer == "embstore":
        try:
            found, reference = open_store(path, partial=True), open_store(whole)
            is_there = [rows for rows in found.committed_rows[:reported] if _same(found, reference, rows)]
        except EmbstoreError:
            return reported
        return reported - len(is_there)
    return sum(not _reads(path, chunk) for chunk in range(reported))


def _same(found: EmbeddingStore, reference: EmbeddingStore, rows: RowRange) -> bool:
    ids = reference.ids[rows.start : rows.stop]
    return found.rows(ids).tobytes() == reference.rows(ids).tobytes()


def _reads(path: Path, chunk: int) -> bool:
    import zarr  # noqa: PLC0415

    try:
        rows = zarr.open_array(path, mode="r")[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS]
    except Exception:  # noqa: BLE001 - whatever a damaged array raises, it was not read
        return False
    return np.asarray(rows).tobytes() == expected(chunk).tobytes()


def measure(kind: Kind, writer: str, log: Log, cuts: int, whole: Path) -> dict[str, object]:
    """Cut one writer off ``cuts`` times."""
    chance = random.Random(f"{kind} {writer} {log}")
    reported_chunks = lost_chunks = 0
    with new_disk(kind) as disk:
        for _ in range(cuts):
            disk.clear()
            command = [sys.executable, "-m", "benchmarks.peer_power_cuts", "--write", writer, str(disk.path / "store")]
            moment = chance.randint(1, NUM_CHUNKS - 5)
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                lines = iter(process.stdout or ())
                reported = [next(lines, "") for _ in range(moment)]
                disk.cut(log)
                process.kill()
            if reported[-1] != f"{moment - 1}\n":
                raise RuntimeError(f"{writer} failed before the cut")
            disk.restore()
            reported_chunks += moment
            lost_chunks += lost(writer, disk.path / "store", moment, whole)
    return {
        "file_system": kind,
        "log": log.words,
        "writer": writer,
        "cuts": cuts,
        "reported": reported_chunks,
        "lost_or_wrong": lost_chunks,
    }


def main() -> None:
    """Measure every writer, or be one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=10, help="per writer, file system and state of the log")
    parser.add_argument("--write", nargs=2, metavar=("WRITER", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write[0], Path(options.write[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "store"
        write("embstore", whole)
        rows = [
            measure(kind, writer, log, options.cuts, whole)
            for kind in KINDS
            for writer in WRITERS
            for log in (Log.FLUSHED, Log.LOST)
        ]
    versions = {name: metadata.version(name) for name in ("zarr", "tensorstore")}
    results = {"command": "python -m benchmarks.peer_power_cuts", "versions": versions, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    for row in rows:
        print(*row.values(), sep=" | ")


if __name__ == "__main__":
    main()
