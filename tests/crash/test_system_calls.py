"""A fault in every system call on a store, by the kernel: SIGKILL, and every error that the call may return.

strace counts only calls that touch the store, so the n-th is always one of ours; n = 1, 2, ... until the run completes.
Which calls and paths there are comes from a trace of everything; test_order asserts that no kind is missing.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from embstore.core.errors import ExitCode
from embstore.core.events import Event, StageStarted
from embstore.views.info import verify
from tests.support.build_fake import CONFIG_HNSW, perform
from tests.support.faults import SYNCS
from tests.support.fork_server import Child, ForkServer
from tests.support.stores import WINDOWS, Stopped, build_small, snapshot
from tests.support.strace import CHANGING, TracedCall, Tracer, find_strace
from tests.support.tally import Counter

Windows = set[tuple[int, int]]

# What the manual pages and file systems give. A call that needs no space finds no full disk; EROFS comes from any change
# once ext4 or xfs found its log broken; a file on NFS is written, and so fails, when it is closed.
_CHANGE = ("EIO", "EROFS")
_SPACE = ("ENOSPC", "EDQUOT", *_CHANGE)
ERRORS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("write", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename", "mkdir", "symlink"), _SPACE),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), _CHANGE),
    "openat": (*_SPACE, "EMFILE"),
    "close": ("ENOSPC", "EDQUOT", "EIO"),
    "flock": ("EIO", "ENOLCK"),
    "fcntl": ("EMFILE",),  # numpy copies the descriptor of a file it maps
    **dict.fromkeys(("read", "pread64", "getdents64"), ("EIO",)),
}
# of a file or folder that is open for reading
READING_ERRORS: Mapping[str, tuple[str, ...]] = {"openat": ("EIO", "EMFILE"), "close": ("EIO",)}
_JUDGED = ("openat", "close", "write", "pwrite64", "rename", *SYNCS)  # calls that the verdict looks at


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is disturbed: the first of ``actions``, on a copy of ``start``; undisturbed they end in ``oracle``.

    ``sound`` windows are committed in ``start``, so no run may compute them. ``trace`` holds the first action's calls on the
    store, and ``paths`` what they touch; a temporary name has PID for the process.
    """

    name: str
    actions: tuple[str, ...]
    start: Path | None
    sound: frozenset[tuple[int, int]]
    oracle: dict[str, str]
    trace: list[TracedCall]
    paths: tuple[str, ...]

    @functools.cached_property
    def calls(self) -> dict[str, list[TracedCall]]:
        """The trace by kind of call."""
        kinds = dict.fromkeys(call.name for call in self.trace)
        return {kind: [call for call in self.trace if call.name == kind] for kind in kinds}

    def count(self, kinds: Iterable[str]) -> dict[str, int]:
        """How often it makes each kind of call."""
        return {call: len(self.calls[call]) for call in kinds if call in self.calls}

    def errors(self, call: str, count: int) -> tuple[str, ...]:
        """What the ``count``-th call of a kind may return."""
        is_reading = _is_reading(self.trace, self.calls[call][count - 1])
        return READING_ERRORS.get(call, ERRORS[call]) if is_reading else ERRORS[call]


def _is_reading(calls: list[TracedCall], made: TracedCall) -> bool:
    """Whether a call opens a file for reading, or works on one that ``calls`` opened so, the last time before it."""
    before = next(index for index, call in enumerate(calls) if call is made)
    opened = [call for call in calls[: before + 1] if call.name == "openat" and call.path == made.path]
    if made.name != "openat":
        opened = [call for call in opened if call.descriptor == made.descriptor]
    return bool(opened) and opened[-1].only_reads


@dataclass(kw_only=True, slots=True)
class Arena:
    """One place on disk where every run happens, so that all runs touch the same paths."""

    server: ForkServer
    tracer: Tracer
    prompts: Path
    store: Path

    def scenario(
        self,
        name: str,
        actions: tuple[str, ...],
        *,
        start: Path | None,
        sound: Iterable[tuple[int, int]],
        oracle: Path | None,
    ) -> Scenario:
        """Run it undisturbed, with everything traced; ``oracle`` None: what this very run leaves."""
        child = self._start(actions[0], start)
        code, everything = self.tracer.follow(child)
        assert code == 0, child.lines
        trace = [call for call in everything if any(self._is_ours(path) for path in call.paths)]
        touched = {path for call in trace for path in call.paths if self._is_ours(path)}
        for action in actions[1:]:
            assert perform(action, self.store, self.prompts, lambda line: None) == 0
        return Scenario(
            name=name,
            actions=actions,
            start=start,
            sound=frozenset(sound),
            oracle=snapshot(oracle or self.store),
            trace=trace,
            paths=tuple(sorted(path.replace(f".{child.pid:08}.tmp", ".PID.tmp") for path in touched)),
        )

    def disturb(self, scenario: Scenario, inject: str, *, calls: Iterable[str]) -> tuple[int, Child, list[TracedCall]]:
        """Run the first action with one fault: its exit code, what it said, and its calls of these kinds."""
        child = self._start(scenario.actions[0], scenario.start)
        paths = [path.replace(".PID.tmp", f".{child.pid:08}.tmp") for path in scenario.paths]
        code, made = self.tracer.follow(child, calls=calls, paths=paths, inject=inject)
        return code, child, made

    def resume(self, scenario: Scenario, child: Child, *, unreadable: int = 0) -> list[str]:
        """Run every action after ``child``, undisturbed; what is wrong then. So many windows could not be read back."""
        lines: list[str] = []
        for action in scenario.actions:
            try:
                code = perform(action, self.store, self.prompts, lines.append)
            except Exception as error:  # noqa: BLE001 - one finding of many
                return [f"then {action} raised {error!r}"]
            if code != 0:
                return [f"then {action} returned {code}: {lines[-1]}"]
        words = [line.split() for line in lines if line.startswith("computing ")]
        after = {(int(start), int(stop)) for _, start, stop in words}
        again = after & (child.acknowledged | scenario.sound) | child.computed & scenario.sound
        found = [f"acknowledged windows {sorted(again)} were computed again"] if len(again) > unreadable else []
        now = snapshot(self.store)
        other = sorted(name for name in now.keys() | scenario.oracle.keys() if now.get(name) != scenario.oracle.get(name))
        found += [f"other bytes in {', '.join(other)}"] if other else []
        return found + [f"verify: {finding.path} {finding.message}" for finding in verify(self.store).findings]

    def _start(self, action: str, start: Path | None) -> Child:
        shutil.rmtree(self.store, ignore_errors=True)
        if start is not None:
            shutil.copytree(start, self.store, symlinks=True)
        return self.server.start(action, self.store, self.prompts, held=True)

    def _is_ours(self, path: str) -> bool:
        return path in (str(self.store), str(self.store.parent)) or path.startswith(f"{self.store}/")


@pytest.fixture(scope="module")
def arena(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("arena")
    (folder / "disk").mkdir()
    tracer = Tracer(program=find_strace(), log=folder / "trace")
    with ForkServer(warm=True) as server:
        yield Arena(server=server, tracer=tracer, prompts=small_prompts, store=folder / "disk" / "store")


@pytest.fixture(scope="module")
def scenario_of(
    arena: Arena, finished_store: Path, partial_store: Path, small_prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Scenario]:
    """Scenarios by name; each is run once, undisturbed, when it is first asked for."""
    folder = tmp_path_factory.mktemp("starts")
    first = WINDOWS[:1]

    def made(name: str) -> Scenario:
        if name == "build":
            return arena.scenario(name, ("build",), start=None, sound=(), oracle=finished_store)
        if name == "resumed build":
            battered = _battered(partial_store, folder / "battered")
            return arena.scenario(name, ("build",), start=battered, sound=first, oracle=finished_store)
        if name == "HNSW search":
            build_small(small_prompts, folder / "whole", config=CONFIG_HNSW)
            searching = _before_search(small_prompts, folder / "searching")
            return arena.scenario(name, ("build-hnsw",), start=searching, sound=WINDOWS, oracle=folder / "whole")
        if name == "new weights":
            return arena.scenario(name, ("weights",), start=finished_store, sound=WINDOWS, oracle=None)
        damaged = _damaged(finished_store, folder / "damaged")
        return arena.scenario(name, ("repair", "build"), start=damaged, sound=first, oracle=finished_store)

    return functools.cache(made)


def _battered(partial: Path, store: Path) -> Path:
    """One window committed, and everything beside it that opening an unfinished store has to mend."""
    shutil.copytree(partial, store, symlinks=True)
    with (store / "journal.jsonl").open("ab") as file:
        file.write(b'{"record":"window","torn')
    for name, size in (("coordinates.npy", 2000), ("residuals.npy", 300), ("sequences.npy", 401)):
        os.truncate(store / name, size)
    for name in (".spec.json.1.tmp", "embeddings.zarr/.c.2.0.1.tmp", "work/rows.spool"):
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_bytes(b"left")
    return store


def _before_search(prompts: Path, store: Path) -> Path:
    """All rows committed, no neighbours yet."""

    def stop(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "knn":
            raise Stopped

    with pytest.raises(Stopped):
        build_small(prompts, store, config=CONFIG_HNSW, observer=stop)
    return store


def _damaged(finished: Path, store: Path) -> Path:
    """A finished store with a damaged second window, a damaged third one, and one small file that is wrong."""
    shutil.copytree(finished, store, symlinks=True)
    chunk = bytearray((store / "embeddings.zarr" / "c.2.0").read_bytes())
    chunk[100] ^= 1
    (store / "embeddings.zarr" / "c.2.0").write_bytes(chunk)
    os.truncate(store / "coordinates.npy", (store / "coordinates.npy").stat().st_size - 8)
    (store / "embeddings.zarr" / "zarr.json").write_bytes(b"{}")
    return store


# --- killed -----------------------------------------------------------------------------------------------------------


def _kill(arena: Arena, scenario: Scenario, call: str, count: int) -> tuple[bool, list[str]]:
    """Kill at one call, then resume: whether it was killed, and what is wrong afterwards."""
    code, child, _ = arena.disturb(scenario, f"{call}:signal=KILL:when={count}", calls=[call])
    if code not in (0, -9):
        return True, [f"exit code {code}: {child.lines[-1]}"]
    return code != 0, arena.resume(scenario, child)


@pytest.mark.usefixtures("without_syncs")
def test_a_kill_at_a_system_call_is_resumed_to_the_same_bytes(
    arena: Arena, scenario_of: Callable[[str], Scenario], tally: Counter
) -> None:
    scenario, lost = scenario_of("build"), []
    for call, count in scenario.count(CHANGING).items():  # the last of each kind
        killed, wrong = _kill(arena, scenario, call, count)
        assert killed, f"a trace showed {call} {count}, this run made fewer"
        tally(f"SIGKILL at the n-th system call, {scenario.name}", losses=bool(wrong))
        lost += [f"{call} {count}: {text}" for text in wrong]
    assert not lost, "\n".join(lost)


@pytest.mark.faults
@pytest.mark.usefixtures("without_syncs")
@pytest.mark.parametrize("name", ["build", "resumed build", "HNSW search", "new weights", "repair"])
def test_a_kill_at_every_system_call_is_resumed_to_the_same_bytes(
    name: str, arena: Arena, scenario_of: Callable[[str], Scenario], tally: Counter
) -> None:
    scenario, lost = scenario_of(name), []
    for call, total in scenario.count(CHANGING).items():
        for count in itertools.count(1):
            killed, wrong = _kill(arena, scenario, call, count)
            lost += [f"{call} {count}: {text}" for text in wrong]
            if not killed:
                break
            tally(f"SIGKILL at the n-th system call, {scenario.name}", losses=bool(wrong))
        assert count == total + 1, f"killed at {count - 1} of {total} calls of {call}"
    assert not lost, "\n".join(lost)


# --- refused ----------------------------------------------------------------------------------------------------------


def _fail(arena: Arena, scenario: Scenario, call: str, count: int, error: str) -> list[str]:
    """One error at one call, then a plain run: what is wrong."""
    inject = f"{call}:error={error}:when={count}"
    code, child, made = arena.disturb(scenario, inject, calls={*_JUDGED, call})
    position = next((index for index, one in enumerate(made) if one.injected), -1)
    assert position >= 0, f"a trace showed {call} {count}, this run made fewer"
    is_unreadable = error == "EIO" and _is_reading(made, made[position])
    wrong = _exit_problems(arena, made, position, code, child, error, is_unreadable=is_unreadable)
    wrong += _call_problems(arena, made, position)
    flips = [one for one in made if one.name == "rename" and one.path == f"{arena.store}/manifest.json" and not one.failed]
    if scenario.name in ("build", "resumed build") and code != 0 and (arena.store / "manifest.json").exists() != bool(flips):
        wrong.append("a manifest without its rename")
    wrong += arena.resume(scenario, child, unreadable=int(is_unreadable))
    return [f"{call} {count} {error} {made[position].path}: {text}" for text in wrong]


def _exit_problems(
    arena: Arena, made: list[TracedCall], position: int, code: int, child: Child, error: str, *, is_unreadable: bool
) -> list[str]:
    """The exit code and the last line must say what failed, unless it is nothing that the store needs.

    What a disk cannot read any more is damage, like a byte that is wrong: found, named, and its window computed again.
    """
    failed, said = made[position], child.lines[-1]
    if code == ExitCode.OK:
        is_scratch = failed.path.startswith(f"{arena.store}/work")
        is_listing = failed.name == "openat" and "O_NONBLOCK|O_CLOEXEC|O_DIRECTORY" in failed.args  # verify looks for strays
        is_link = failed.name == "symlink" and error == "EROFS"  # some file systems have no links: a copy takes its place
        harmless = is_scratch or is_listing or is_unreadable or is_link or failed.name == "close"
        return [] if harmless else ["exit code 0: the error was ignored"]
    allowed = {ExitCode.LOCKED if failed.name == "flock" else ExitCode.INCOMPLETE}
    if error == "EROFS" and not any(one.name == "fsync" and one.path.endswith("/journal.jsonl") for one in made[:position]):
        allowed.add(ExitCode.ERROR)  # the store is not open yet: a wrong --out
    if is_unreadable:
        allowed.add(ExitCode.CORRUPT)
    if code not in allowed:
        return [f"exit code {code}: {said}"]
    names = [_published(path, child.pid) for path in failed.paths]
    # in full, or that of its folder, or inside the store
    known = [*names, f" {Path(names[-1]).parent} ", f": {os.path.relpath(names[-1], arena.store)} "]
    wrong = [] if any(text in said for text in known) else [f"does not name it: {said}"]
    return wrong if os.strerror(getattr(errno, error)) in said else [*wrong, f"does not say why: {said}"]


def _published(path: str, pid: int) -> str:
    """The name that a temporary one is for."""
    temp = Path(path)
    return str(temp.with_name(temp.name[1:].removesuffix(f".{pid:08}.tmp"))) if path.endswith(f".{pid:08}.tmp") else path


def _call_problems(arena: Arena, made: list[TracedCall], position: int) -> list[str]:
    """After a failed sync the kernel takes the pages for clean: a second sync would lie, another line would be lost."""
    failed, after = made[position], made[position + 1 :]
    wrong = []
    if failed.name in SYNCS and any(one.name in SYNCS and one.path == failed.path for one in after):
        wrong.append("it was synced again")
    journal = f"{arena.store}/journal.jsonl"
    if failed.path == journal and failed.name in ("write", *SYNCS):
        wrong += ["the journal took another line" for one in after if one.path == journal and one.name == "write"]
    return wrong


@pytest.mark.usefixtures("without_syncs")
def test_an_error_at_a_system_call_is_told_and_resumed(
    arena: Arena, scenario_of: Callable[[str], Scenario], tally: Counter
) -> None:
    scenario, lost = scenario_of("build"), []
    changing = set(CHANGING) - {"openat"} | {"close"}
    for number, (call, count) in enumerate(scenario.count(sorted(changing)).items()):
        errors = scenario.errors(call, count)
        error = errors[number % len(errors)]
        wrong = _fail(arena, scenario, call, count, error)
        tally(f"{error} at the n-th system call, {scenario.name}", losses=bool(wrong))
        lost += wrong
    assert not lost, "\n".join(lost)


@pytest.mark.faults
@pytest.mark.usefixtures("without_syncs")
@pytest.mark.parametrize("name", ["build", "resumed build", "new weights", "repair"])
def test_every_error_at_every_system_call_is_told_and_resumed(
    name: str, arena: Arena, scenario_of: Callable[[str], Scenario], tally: Counter
) -> None:
    scenario, lost = scenario_of(name), []
    for call, total in scenario.count(ERRORS).items():
        for count in range(1, total + 1):
            for error in scenario.errors(call, count):
                wrong = _fail(arena, scenario, call, count, error)
                tally(f"{error} at the n-th system call, {scenario.name}", losses=bool(wrong))
                lost += wrong
    assert not lost, "\n".join(lost)
