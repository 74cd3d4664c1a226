"""Fixtures that many tests share; what they are made of is in tests/support."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support.evidence import Evidence, write_evidence
from tests.support.fork_server import ForkServer
from tests.support.stores import build_part, build_small, write_small_prompts
from tests.support.tally import Counter, Row, Tally

# torch's threads sleep while they wait for each other: spinning, they take the cores of the other test processes. libgomp
# reads it once, so it is set before anything imports torch, and processes that tests start inherit it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# pytest imports every module for its doctests, and this one imports a trainer that only make test-trainers installs
collect_ignore = [] if importlib.util.find_spec("lightning") else ["support/lightning_runs.py"]

_TALLY = pytest.StashKey[Tally]()
_EVIDENCE = pytest.StashKey[list[Evidence]]()
_STARTED = time.monotonic()

# no test writes into the checkout: a failure prints what repeats it
hypothesis.settings.register_profile("embstore", database=None, print_blob=True)
hypothesis.settings.load_profile("embstore")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-report", metavar="FILE", help="write what faults were injected, and what was lost, as JSON")
    parser.addoption("--trainer-report", metavar="FILE", help="write what was proven of trainers, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TALLY] = Tally()
    config.stash[_EVIDENCE] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    counted = session.config.stash[_TALLY]
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first of them writes the report
        session.config.workeroutput["faults"] = [dataclasses.asdict(row) for row in counted.rows.values()]
        session.config.workeroutput["evidence"] = [dataclasses.asdict(row) for row in session.config.stash[_EVIDENCE]]
        return
    if path := session.config.getoption("--fault-report"):
        counted.write(Path(path), seconds=time.monotonic() - _STARTED, passed=exitstatus == 0)
    if path := session.config.getoption("--trainer-report"):
        write_evidence(Path(path), session.config.stash[_EVIDENCE])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for row in getattr(node, "workeroutput", {}).get("faults", []):
        node.config.stash[_TALLY].add(Row(**row))
    node.config.stash[_EVIDENCE].extend(Evidence(**row) for row in getattr(node, "workeroutput", {}).get("evidence", []))


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes what a test has proven of a trainer, for the table of docs/train; see tests.support.evidence."""
    test = request.node.nodeid.split("[")[0]
    noted = request.config.stash[_EVIDENCE]
    return lambda **proven: noted.append(Evidence(test=test, **proven))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Counter:
    """Counts injected faults for the report; see tests.support.tally."""
    test = request.node.nodeid.split("[")[0]
    return Counter(tally=request.config.stash[_TALLY], test=test)


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """Starts builds with the fake embedder in processes of their own, in milliseconds."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Steps of a tiny model gain nothing from more threads of torch, and lose much where other processes want the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Joins are kept in a folder of the test run, not in the user's."""
    os.environ["EMBSTORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def small_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small prompts file: 73 lines, 70 rows."""
    return write_small_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="session")
def finished_store(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small store, the oracle of byte identity; read it, never write to it."""
    store = tmp_path_factory.mktemp("finished") / "store"
    build_small(small_prompts, store)
    return store


@pytest.fixture(scope="session")
def partial_store(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store with one of three windows committed; read it, never write to it."""
    return build_part(small_prompts, tmp_path_factory.mktemp("partial") / "store", rows=32)


@pytest.fixture
def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync takes milliseconds and changes no byte that a test could read; what syncs are for is tested in tests/crash."""
    for name in ("fsync", "fdatasync"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, lambda handle: None)


@pytest.fixture
def store(finished_store: Path, tmp_path: Path) -> Path:
    """A finished small store of the test's own."""
    return Path(shutil.copytree(finished_store, tmp_path / "store", symlinks=True))


@pytest.fixture
def unfinished(partial_store: Path, tmp_path: Path) -> Path:
    """A part-built small store of the test's own."""
    return Path(shutil.copytree(partial_store, tmp_path / "unfinished", symlinks=True))
