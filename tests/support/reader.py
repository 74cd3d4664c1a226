"""A process that reads a store again and again while others replace it: ``python -m tests.support.reader STORE``.

It reads until its standard input ends and prints what it saw: how often it met each set of weights, and every error. A
weights file is named by the digest of its values and metadata, so a mixture of two sets gives itself away. The file "seen"
beside the store lists the sets as they are met, so that whoever replaces them knows that they are being read.
"""

from __future__ import annotations

import hashlib
import json
import select
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.flow.artifact import short_digest
from embstore.storage.reader import open_store
from embstore.training import load_weights
from embstore.views.info import inspect, verify

_HELD = 50  # maps of old sets that are kept and read again


def _name(array: NDArray[np.float32], metadata: object) -> str:
    return short_digest({"weights": hashlib.sha256(array.tobytes()).hexdigest(), "metadata": metadata})


def _read(path: Path, held: list[tuple[NDArray[np.float32], str]]) -> tuple[str, list[str]]:
    """The set of weights that training maps now, and what is wrong with anything that was read."""
    wrong = []
    loaded = load_weights(path)
    if _name(loaded.array, loaded.metadata) != loaded.path.stem:
        wrong.append(f"load_weights mixed two sets at {loaded.path.stem}")
    store = open_store(path)
    if _name(store.weights, store.metadata) not in str(store.manifest):
        wrong.append("open_store mixed two sets of weights")
    if store.metadata["neighbors"]["digest"] != store.manifest.neighbors:  # type: ignore[union-attr]
        wrong.append("open_store mixed weights and neighbours")
    if not np.isfinite(store.neighbor_distances[:, 0]).all():
        wrong.append("neighbours are not those of a finished store")
    linked: NDArray[np.float32] = np.load(path / "density_weights.npy", mmap_mode="r", allow_pickle=False)
    if abs(float(linked.sum(dtype=np.float64)) - 1) > 1e-6:
        wrong.append("the link leads to no weights")
    info = inspect(path)
    if not info.is_complete:
        wrong.append("inspect took a finished store for an unfinished one")
    wrong += [f"verify: {finding.path} {finding.message}" for finding in verify(path).findings]
    held.append((loaded.array, hashlib.sha256(loaded.array.tobytes()).hexdigest()))
    del held[:-_HELD]
    wrong += ["a mapped set changed" for array, digest in held if hashlib.sha256(array.tobytes()).hexdigest() != digest]
    return loaded.path.stem, wrong


def main(path: Path) -> None:
    """Read until standard input ends."""
    seen: dict[str, int] = {}
    errors: list[str] = []
    held: list[tuple[NDArray[np.float32], str]] = []
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            name, wrong = _read(path, held)
        except Exception as error:  # noqa: BLE001 - whatever a reader meets is the result
            errors.append(repr(error))
        else:
            if name not in seen:
                path.with_name("seen").write_text("".join(f"{each}\n" for each in [*seen, name]))
            seen[name] = seen.get(name, 0) + 1
            errors += wrong
    json.dump({"seen": seen, "errors": errors}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
