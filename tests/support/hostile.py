"""What is done with a store from a stranger, what it may end in, and what may lie in the place of its files."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from embstore.core.config import WeightingConfig
from embstore.core.errors import EmbstoreError
from embstore.flow.artifact import recompute_weights
from embstore.flow.build import build
from embstore.storage.reader import open_store
from embstore.training import DensitySampler, load_weights
from embstore.views.export import export_store
from embstore.views.info import inspect, neighbors_of, verify
from embstore.views.report.data import read_report
from embstore.views.report.page import render_page
from embstore.views.terminal import print_info, print_neighbors, print_verify
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource

SECONDS = 20  # more than any command on a small store takes; a FIFO or a device would take for ever

# --- what is done with a store ---------------------------------------------------------------------------------------


def _read(store: Path) -> None:
    opened = open_store(store, partial=True)
    for name in ("ids", "aliases", "coordinates", "residuals", "sequences", "multiplicity", "line_rows", "keys", "prompts"):
        getattr(opened, name)
    opened.rows(opened.ids[:3])
    for _ in opened.iter_rows():
        pass
    opened.neighbors(opened.ids[0])
    for name in ("weights", "metadata", "neighbor_ids", "neighbor_distances", "groups", "neighbor_spec", "embeddings"):
        getattr(opened, name)


def _train(store: Path) -> None:
    weights = load_weights(store, expect_keys=np.arange(70))
    DensitySampler(weights).plan(0)


READERS: Mapping[str, Callable[[Path], object]] = {
    "inspect": lambda store: print_info(_terminal(), inspect(store, by="src")),
    "neighbors": lambda store: print_neighbors(_terminal(), "given-0", neighbors_of(store, "given-0")),
    "verify": lambda store: print_verify(_terminal(), verify(store), repaired=False),
    "open": _read,
    "report": lambda store: render_page(read_report(store)),
    "load_weights": lambda store: DensitySampler(load_weights(store), positional=True).plan(0),
    "load_weights with keys": _train,
    "export": lambda store: export_store(store, store.parent / "exported", format="kat"),
}
WRITERS: Mapping[str, Callable[[Path], object]] = {
    "weights": lambda store: recompute_weights(store, WeightingConfig(gamma=2), name="sharp"),
    "repair": lambda store: verify(store, repair=True),
    "resume": lambda store: build(None, out=store, config=CONFIG, resume=True, source=FakeSource()),
}
COMMANDS = {**READERS, **WRITERS}


class Escaped(Exception):
    """A terminal was sent what a store holds, unescaped."""


class Hang(BaseException):
    """A command waits for something that never comes; nothing in the package catches this."""


# what no terminal shows: control characters but the line end, C1 controls, changes of direction
_ACTED_ON = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class _Terminal(io.StringIO):
    def write(self, text: str) -> int:
        if _ACTED_ON.search(text):
            raise Escaped(repr(text))
        return len(text)


def _terminal() -> Console:
    """A console that styles nothing, so every control character in it came from the store."""
    return Console(file=_Terminal(), width=200, emoji=False)


def untyped(action: Callable[[], object]) -> str | None:
    """What an action ended in that is neither a result nor a typed error, or None."""
    try:
        # numbers that no row has may make numpy warn on the way to an error: that is no outcome
        with _time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            action()
    except EmbstoreError:
        return None
    except (Exception, Hang) as error:  # noqa: BLE001 - whatever it is, it is the finding
        return "".join(traceback.format_exception(error))
    return None


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(kw_only=True)
class Arena:
    """A folder with a hostile store, and beside it what no command on the store may touch."""

    pristine: Path
    root: Path
    exported: Path = field(init=False)

    def __post_init__(self) -> None:
        self.root.mkdir()
        self.outside = self.root / "outside"
        shutil.copytree(self.pristine, self.outside, symlinks=True)
        for name in ("work", "weights"):
            (self.outside / name).mkdir(exist_ok=True)
        (self.outside / "work" / "mine").write_text("mine")
        (self.outside / "weights" / "mine.npy").write_text("mine")
        self._before = _listing(self.outside)
        self.exported = self.root / "exported"

    def fresh(self) -> Path:
        """A new copy of the valid store, to be made hostile."""
        store = self.root / "store"
        for folder in (store, self.exported):
            if folder.exists():
                shutil.rmtree(folder)
        return Path(shutil.copytree(self.pristine, store, symlinks=True))

    def problems(self, store: Path, commands: Mapping[str, Callable[[Path], object]]) -> list[str]:
        """Every command that ended otherwise than it may, in what; and files outside that changed."""
        found = []
        for name, command in commands.items():
            problem = untyped(functools.partial(command, store))
            if problem is not None:
                found.append(f"{name}: {problem}")
            beside = {path.name for path in self.root.iterdir()} - {"store", "outside", "exported"}
            if beside or _listing(self.outside) != self._before:
                found.append(f"{name}: wrote outside the store")
            if self.exported.exists():
                shutil.rmtree(self.exported)
        return found


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    listed = []
    for path in sorted(folder.rglob("*")):
        found = path.lstat()
        listed.append((str(path), 0 if path.is_dir() else found.st_size, found.st_mtime_ns))
    return listed


# --- things in the place of files ------------------------------------------------------------------------------------


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sparse(path: Path) -> None:
    content = path.read_bytes()
    with path.open("wb") as file:
        file.write(content)
        file.truncate(1 << 40)


def _socket(path: Path) -> None:
    _remove(path)
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as opened:  # a long path is no address
        opened.bind(path.name)


def _link(target: Callable[[Path, str], str]) -> Callable[[Path, str], None]:
    def put(store: Path, name: str) -> None:
        _remove(store / name)
        (store / name).symlink_to(target(store, name))

    return put


def _put(replace: Callable[[Path], object]) -> Callable[[Path, str], None]:
    def put(store: Path, name: str) -> None:
        if replace not in (_sparse, _socket) and (store / name).exists():
            _remove(store / name)
        replace(store / name)

    return put


# what may lie where a file or folder of a store should: by name, how to put it there
KINDS: Mapping[str, Callable[[Path, str], None]] = {
    "a link to the same thing outside": _link(lambda store, name: str(store.parent / "outside" / name)),
    "a link to a folder outside": _link(lambda store, name: str(store.parent / "outside")),
    "a link to a device without end": _link(lambda store, name: "/dev/zero"),
    "a link to nothing": _link(lambda store, name: "nowhere"),
    "a link to itself": _link(lambda store, name: Path(name).name),
    "a FIFO": _put(os.mkfifo),
    "a socket": _put(_socket),
    "an empty folder": _put(lambda path: path.mkdir()),
    "an empty file": _put(lambda path: path.touch()),
}
FILE_KINDS: Mapping[str, Callable[[Path, str], None]] = {"a terabyte of nothing behind it": _put(_sparse)}


def main(stores: list[str], without: list[str]) -> None:
    """Read every store under a limit of anonymous memory; what went wrong and the peak, as JSON on stdout."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
    problems = []
    for store in stores:
        for name, command in READERS.items():
            if name not in without:
                problem = untyped(functools.partial(command, Path(store)))
                problems += [f"{store}, {name}: {problem}"] if problem is not None else []
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"problems": problems, "peak_mebibytes": (after - before) >> 10}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
