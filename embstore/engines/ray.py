"""Ray as the engine: workers are actors that hold one device each; the driver hands out tasks one by one and takes results.

Ray places actors, finds dead ones and carries bytes; what is decided here is short. A worker that died or raised is given
up and another one is asked for; its task is tried elsewhere, ``max_attempts`` times in all, so that neither a bad machine
ends a build nor a bad task repeats for ever. A task is handed out once at a time and its result given once. Nothing waits
without an end: with no worker for ``start_seconds`` the build stops with an error that names what was asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import embstore
from embstore.core.config import EngineConfig
from embstore.core.embedder import Check
from embstore.core.engine import Job, Needs, Result, Task
from embstore.core.errors import ConfigError, EmbstoreError, EngineError, StorageError
from embstore.core.events import Notice, Observer, WorkersChanged
from embstore.engines.ray_actor import worker_class

_POLL_SECONDS = 0.5
_DIAL_SECONDS = 10.0
_SILENT_SECONDS = 300.0
_OBJECT_STORE_BYTES = 256 << 20  # results are a few MiB and taken at once
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
_RESUME = "then run the same command with --resume: everything committed stays"


@dataclass(slots=True)
class _Todo(Generic[Task]):
    task: Task
    attempts: int = 0


@dataclass(slots=True, eq=False)
class _Hand(Generic[Task]):
    """A worker as the driver sees it: ``todo`` is under way, ``reserved`` is what it was told will follow."""

    number: int
    slot: int  # below the workers wanted; names its device where devices are given
    actor: Any
    node: str = "a node that is not known yet"
    is_ready: bool = False
    todo: _Todo[Task] | None = None
    reserved: _Todo[Task] | None = None


class RayEngine:
    """As ``core.engine.Engine``; a Ray that runs already in this process is used, else one is joined or started.

    ``threads`` and ``device`` are those pinned in the spec, what each worker needs; ``shared`` is a folder in the store.
    """

    is_remote = True

    def __init__(self, config: EngineConfig, *, threads: int, device: str, shared: Path) -> None:
        self._config, self._threads, self._device = config, threads, device
        self._shared = shared.absolute()
        self._token = secrets.token_hex(16)
        self._is_ours = False
        self._numbers = 0
        self.traffic_bytes = 0

    def close(self) -> None:
        """End the Ray that was started here."""
        if self._is_ours:
            with _kept_handlers():
                _ray().shutdown()
            self._is_ours = False

    def num_workers(self, needs: Needs) -> int:
        """As ``core.engine.Engine``: as told, or what the cluster has room for."""
        self._connect()
        config, resources = self._config, _ray().cluster_resources()
        count = config.num_workers or len(config.devices)
        if not count and self._device == "cuda":
            count = int(resources.get("GPU", 0) / (config.gpus_per_worker or 1))
        count = count or int(resources.get("CPU", 1) // self._threads)
        return max(1, count) * (self._threads if needs == "core" else 1)

    def map(
        self,
        job: Job[Task, Result],
        tasks: Sequence[Task],
        *,
        check: Check,
        is_stopping: Callable[[], bool],
        observer: Observer,
    ) -> Generator[tuple[Task, Result]]:
        """As ``core.engine.Engine``."""
        if not tasks:
            return
        self._connect()
        run = _Run(self, job, tasks, observer)
        try:
            yield from run.results(check, is_stopping)
        finally:
            run.close()

    # --- Ray ---------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        ray, config = _ray(), self._config
        (self._shared / "token").write_text(self._token)  # what a worker must find under the same path
        if ray.is_initialized():
            return
        options: dict[str, Any] = {"address": config.ray_address}
        if config.ray_address is None:
            workers = config.num_workers or len(config.devices)
            options = {
                "address": "local",
                "num_cpus": workers * self._threads if workers else None,
                "num_gpus": None if self._device == "cuda" and not config.devices else 0,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "include_dashboard": False,
            }
        try:
            if config.ray_address not in (None, "auto"):
                host, _, port = str(config.ray_address).partition(":")
                socket.create_connection((host, int(port)), timeout=_DIAL_SECONDS).close()  # Ray tries for minutes
            with _kept_handlers():
                ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
        except Exception as error:  # Ray raises a dozen kinds here
            where = config.ray_address or "this machine"
            raise EngineError(
                f"Ray on {where} gave: {_first_line(error)}",
                hint="is a cluster up (ray status), and is its Ray this one's version? Then run the command again",
            ) from error
        self._is_ours = True
        # what Ray says of dead workers goes to stdout, where results are, and no option turns it off
        internals: Any = sys.modules.get("ray._private.worker")
        if hasattr(internals, "print_to_stdstream"):
            internals.print_to_stdstream = lambda *_, **__: None

    def hire(self, needs: Needs, slot: int) -> tuple[_Hand[Any], Any]:
        """Ask for an actor, and for its greeting: the worker as the driver sees it, and a reference."""
        config = self._config
        is_core = needs == "core"
        gpus = (config.gpus_per_worker or 1) if self._device == "cuda" and not config.devices and not is_core else 0
        options = {"num_cpus": 1 if is_core else self._threads, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        actor = _ray().remote(worker_class()).options(**options).remote()
        visible = _visible_device(config.devices[slot]) if config.devices and not is_core else None
        self._numbers += 1
        return _Hand(number=self._numbers, slot=slot, actor=actor), actor.hello.remote(str(self._shared / "token"), visible)

    def wants(self, needs: Needs) -> str:
        """What a worker asks for, for messages."""
        gpus = self._config.gpus_per_worker or 1
        is_gpu = self._device == "cuda" and not self._config.devices and needs == "device"
        return f"{self._threads if needs == 'device' else 1} CPUs" + (f" and {gpus:g} GPUs" if is_gpu else "")

    def refuse_stranger(self, node: str, version: str | None, found: str | None) -> None:
        """Compare what a worker said of itself with what is here."""
        if version != embstore.__version__:
            raise EngineError(
                f"the worker on {node} has embstore {version or 'not installed'}, here is {embstore.__version__}",
                hint=f"install embstore {embstore.__version__} on every machine, {_RESUME}",
            )
        if found != self._token:
            raise EngineError(
                f"the worker on {node} does not see the store: {self._shared}/token holds "
                f"{found or 'nothing'} there, {self._token} here",
                hint=f"put --out on a file system that every machine mounts under the same path, {_RESUME}",
            )

    @property
    def start_seconds(self) -> float:
        """How long a build waits for a worker."""
        return self._config.start_seconds

    @property
    def max_attempts(self) -> int:
        """How often a task is tried."""
        return self._config.max_attempts


class _Run(Generic[Task, Result]):
    """One map: its tasks, and the actors it asked for."""

    def __init__(self, engine: RayEngine, job: Job[Task, Result], tasks: Sequence[Task], observer: Observer) -> None:
        self._engine, self._job, self._observer = engine, job, observer
        self._packed = _ray().cloudpickle.dumps(job)
        self._queue = deque(_Todo(task) for task in tasks)
        self._wanted = min(engine.num_workers(job.needs), len(tasks))
        self._hands: list[_Hand[Task]] = []
        self._pending: dict[Any, _Hand[Task]] = {}
        self._retries = self._lost = self._failed_starts = 0
        self._told = WorkersChanged(alive=0, wanted=0, retries=0, lost=0)
        self._ready_since = self._finished_since = time.monotonic()

    def results(self, check: Check, is_stopping: Callable[[], bool]) -> Generator[tuple[Task, Result]]:
        ray = _ray()
        while self._queue or any(hand.todo or hand.reserved for hand in self._hands):
            if is_stopping():
                self._queue.clear()
                for hand in self._hands:
                    hand.reserved = None
                if not any(hand.todo for hand in self._hands):
                    return
            for hand in self._hands:
                if hand.is_ready and hand.todo is None:
                    self._give(hand)  # what a lost worker left
            self._hire()
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=_POLL_SECONDS)
            check()
            for reference in ready:
                hand = self._pending.pop(reference)
                try:
                    data = ray.get(reference)
                except ray.exceptions.RayError as error:
                    self._lose(hand, _first_line(error))
                    continue
                self._engine.traffic_bytes += len(data)
                yield from self._take(hand, pickle.loads(data))
            self._tell()
            self._refuse_to_wait()

    def close(self) -> None:
        """Give up every worker, and what it is doing."""
        for hand in self._hands:
            self._give_up(hand)
        self._hands.clear()

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _take(self, hand: _Hand[Task], answer: tuple[Any, ...]) -> Generator[tuple[Task, Result]]:
        """What a worker answered; gives the result, if it is one, when the worker has its next task."""
        kind, *said = answer
        if kind == "hello":
            hand.node = said[0]
            self._engine.refuse_stranger(*said)
            self._ask(hand, hand.actor.begin.remote(self._packed, hand.number), len(self._packed))
        elif kind == "refused" and said[0] != StorageError.__name__:
            raise _as_raised(*said)
        elif kind != "done":
            self._lose(hand, f"{said[0]}: {said[1]}")
        elif (finished := hand.todo) is None:
            hand.is_ready, self._failed_starts = True, 0
            self._give(hand)
        else:
            hand.todo = None
            self._finished_since = time.monotonic()
            self._give(hand)
            yield finished.task, said[0]

    def _give(self, hand: _Hand[Task]) -> None:
        """Hand out the next task, and say which one will probably follow."""
        lenders = [other for other in self._hands if other.reserved is not None]
        if hand.reserved is not None:
            hand.todo, hand.reserved = hand.reserved, None
        elif self._queue:
            hand.todo = self._queue.popleft()
        elif lenders:  # of who is slow: what it began of it was in vain
            hand.todo, lenders[0].reserved = lenders[0].reserved, None
        if hand.todo is None:
            return
        if len(self._queue) >= self._wanted:  # at the end nobody keeps a task that another one could begin
            hand.reserved = self._queue.popleft()
        following = hand.reserved.task if hand.reserved is not None else None
        packed = _ray().cloudpickle.dumps((hand.todo.task, following))
        self._ask(hand, hand.actor.run.remote(packed), len(packed))

    def _ask(self, hand: _Hand[Task], reference: Any, sent_bytes: int) -> None:  # noqa: ANN401 - Ray's own type
        self._engine.traffic_bytes += sent_bytes
        self._pending[reference] = hand

    def _lose(self, hand: _Hand[Task], reason: str) -> None:
        """Give a worker up and its task to another one, unless it was tried often enough.

        Raises
        ------
        EngineError
            This was the task's last try, or no worker has started in as many.
        """
        self._hands.remove(hand)
        self._give_up(hand)
        self._lost += 1
        todo, reserved = hand.todo, hand.reserved
        if reserved is not None:
            self._queue.appendleft(reserved)
        most = self._engine.max_attempts
        if todo is not None:
            todo.attempts += 1
            self._retries += 1
            if todo.attempts >= most:
                raise EngineError(
                    f"{self._job.name(todo.task)} failed {todo.attempts} times, last on {hand.node}: {reason}",
                    hint=f"look into that prompt or machine, {_RESUME}",
                )
            self._queue.appendleft(todo)
        elif not hand.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= most:
                raise EngineError(
                    f"{self._failed_starts} workers in a row could not start, last on {hand.node}: {reason}",
                    hint=f"make room for the model there or ask for fewer --num-workers, {_RESUME}",
                )

    # --- workers -----------------------------------------------------------------------------------------------------

    def _hire(self) -> None:
        """Ask for workers until there are as many as wanted, or as tasks."""
        open_tasks = len(self._queue) + sum(bool(hand.todo) + bool(hand.reserved) for hand in self._hands)
        while len(self._hands) < min(self._wanted, open_tasks):
            slot = min(set(range(self._wanted)) - {hand.slot for hand in self._hands})
            hand, greeting = self._engine.hire(self._job.needs, slot)
            self._hands.append(hand)
            self._pending[greeting] = hand

    def _give_up(self, hand: _Hand[Task]) -> None:
        self._pending = {reference: other for reference, other in self._pending.items() if other is not hand}
        with contextlib.suppress(_ray().exceptions.RayError):  # it may be dead, or its node gone
            _ray().kill(hand.actor)
        self._job.lost(hand.number)

    def _tell(self) -> None:
        alive = sum(hand.is_ready for hand in self._hands)
        now = WorkersChanged(alive=alive, wanted=self._wanted, retries=self._retries, lost=self._lost)
        if now != self._told:
            self._told = now
            self._observer(now)

    def _refuse_to_wait(self) -> None:
        """Nothing waits for ever: not for a first worker, and not in silence for a task."""
        now = time.monotonic()
        if any(hand.is_ready for hand in self._hands):
            self._ready_since = now
        elif now - self._ready_since > self._engine.start_seconds:
            raise EngineError(
                f"no worker could start within {self._engine.start_seconds:g} s: each asks for "
                f"{self._engine.wants(self._job.needs)}, free are {_free_resources()}",
                hint=f"add machines or free some, or ask for less with --gpus-per-worker and --threads, {_RESUME}",
            )
        if now - self._finished_since > _SILENT_SECONDS:
            self._finished_since = now
            busy = [f"{self._job.name(hand.todo.task)} on {hand.node}" for hand in self._hands if hand.todo is not None]
            self._observer(Notice(message=f"no task has finished for {_SILENT_SECONDS:g} s; at work: {'; '.join(busy)}"))


def _as_raised(name: str, message: str, hint: str | None) -> EmbstoreError:
    """A worker's refusal as the error it was there."""
    kinds = [EmbstoreError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = next((kind for kind in kinds if kind.__name__ == name), EngineError)
    error = kind.__new__(kind)
    EmbstoreError.__init__(error, message, hint=hint)
    return error


def refuse_missing() -> None:
    """Say that Ray is missing before anything is done for it."""
    _ray()


def _ray() -> Any:  # noqa: ANN401 - untyped where it is not installed
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray  # noqa: PLC0415 - an extra, and a third of a second
        import ray.cloudpickle  # noqa: PLC0415
        import ray.exceptions  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"workers of their own need Ray, which is not here ({error})",
            hint="pip install 'embstore[ray]', or --engine local",
        ) from error
    return ray


@contextlib.contextmanager
def _kept_handlers() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM in place of whoever has one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _visible_device(name: str) -> str | None:
    """What a worker's CUDA_VISIBLE_DEVICES must be for this device of this machine; None leaves it."""
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return None
    visible = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    if not visible:
        return index
    if int(index) >= len(visible):
        raise ConfigError(f"device {name} is not among the {len(visible)} that CUDA_VISIBLE_DEVICES lets through")
    return visible[int(index)]


def _free_resources() -> str:
    free = _ray().available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"
