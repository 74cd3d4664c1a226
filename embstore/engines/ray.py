"""The engine on Ray: each worker is an actor with one device; the driver hands out tasks one by one and collects results.

Ray places actors, detects dead ones and transfers bytes. ``dispatch`` decides which worker gets which task and what happens
after a failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import embstore
from embstore.core.config import EngineConfig
from embstore.core.decode import words_of
from embstore.core.errors import ConfigError, EngineError
from embstore.core.events import Observer
from embstore.core.interfaces import Check, Job, Needs, Result, Task
from embstore.engines.dispatch import RESUME, Dispatch

_DIAL_SECONDS = 10.0
_OBJECT_STORE_BYTES = 256 << 20  # results are a few MiB and fetched immediately
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


class RayEngine:
    """An ``Engine`` on Ray: uses the Ray instance of this process, or joins or starts one.

    ``threads`` and ``device`` are pinned in the spec: the resources of each worker. ``shared`` is a folder in the store.
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
        """Shut Ray down if it was started here."""
        if self._is_ours:
            with _kept_handlers():
                _ray().shutdown()
            self._is_ours = False

    def num_workers(self, needs: Needs) -> int:
        """The configured number of workers, or as many as fit the cluster."""
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
        """See ``Engine.map``."""
        if not tasks:
            return
        self._connect()
        dispatch = Dispatch(self, self._config, job, tasks, observer)
        try:
            yield from dispatch.results(check, is_stopping)
        finally:
            dispatch.close()

    # --- Ray ---------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        ray, config = _ray(), self._config
        (self._shared / "token").write_text(self._token)  # every worker must find this token at the same path
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
        except Exception as error:  # Ray raises a dozen kinds of errors here
            where = config.ray_address or "this machine"
            raise EngineError(
                f"connecting to Ray on {where} failed: {_first_line(error)}",
                hint="check with `ray status` that the cluster runs this version of Ray, then run the command again",
            ) from error
        self._is_ours = True
        # Ray prints messages about dead workers to stdout, where results go, and no option turns that off
        internals: Any = sys.modules.get("ray._private.worker")
        if hasattr(internals, "print_to_stdstream"):
            internals.print_to_stdstream = lambda *_, **__: None

    def hire(self, needs: Needs, slot: int) -> tuple[int, Any, Any]:
        """As ``Pool.hire``; the actor starts when its resources are free."""
        config = self._config
        is_core = needs == "core"
        gpus = (config.gpus_per_worker or 1) if self._device == "cuda" and not config.devices and not is_core else 0
        options = {"num_cpus": 1 if is_core else self._threads, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        actor = _ray().remote(_worker_class()).options(**options).remote()
        visible = _visible_device(config.devices[slot]) if config.devices and not is_core else None
        self._numbers += 1
        return self._numbers, actor, actor.hello.remote(str(self._shared / "token"), visible)

    def wants(self, needs: Needs) -> str:
        """See ``Pool.wants``."""
        gpus = self._config.gpus_per_worker or 1
        is_gpu = self._device == "cuda" and not self._config.devices and needs == "device"
        cpus = f"{self._threads if needs == 'device' else 1} CPUs"
        return f"{cpus}{f' and {gpus:g} GPUs' if is_gpu else ''}; {_free_resources()} are free"

    def refuse_stranger(self, node: str, version: str | None, found: str | None) -> None:
        """As ``Pool.refuse_stranger``: the version differs, or the path is on another file system there."""
        if version != embstore.__version__:
            raise EngineError(
                f"the worker on {node} has embstore {version or 'not installed'}, this process {embstore.__version__}",
                hint=f"install embstore {embstore.__version__} on every machine, {RESUME}",
            )
        if found != self._token:
            raise EngineError(
                f"the worker on {node} does not see the store: {self._shared}/token contains "
                f"{found or 'nothing'} there, {self._token} here",
                hint=f"put --out on a file system that every machine mounts under the same path, {RESUME}",
            )

    def pack(self, value: object) -> bytes:
        """Pickle by value what another process cannot import."""
        packed: bytes = _ray().cloudpickle.dumps(value)
        return packed

    def begin(self, actor: Any, job: bytes, number: int) -> Any:  # noqa: ANN401 - Ray's own types
        """See ``Pool.begin``."""
        return actor.begin.remote(job, number)

    def run(self, actor: Any, tasks: bytes) -> Any:  # noqa: ANN401 - Ray's own types
        """See ``Pool.run``."""
        return actor.run.remote(tasks)

    def answers(self, questions: Sequence[Any], seconds: float) -> list[tuple[Any, bytes | EngineError]]:
        """See ``Pool.answers``."""
        ray = _ray()
        found: list[tuple[Any, bytes | EngineError]] = []
        for reference in ray.wait(list(questions), num_returns=1, timeout=seconds)[0]:
            try:
                found.append((reference, ray.get(reference)))
            except ray.exceptions.RayError as error:
                found.append((reference, EngineError(_first_line(error))))
        return found

    def kill(self, actor: Any) -> None:  # noqa: ANN401 - Ray's own types
        """See ``Pool.kill``."""
        with contextlib.suppress(_ray().exceptions.RayError):  # the worker or its node may be gone already
            _ray().kill(actor)


def _worker_class() -> type:
    """The actor class. It is local, so it is pickled by value and can report that another embstore version is installed."""

    class EmbstoreWorker:
        """Answers with the pickled tuples that ``Pool`` describes; it never raises, because Ray would wrap the exception."""

        def hello(self, token: str, visible: str | None) -> bytes:
            """The worker's node, its embstore version, and the token it finds in the store."""
            import os  # noqa: PLC0415 - pickled by value, the class cannot use this module's imports
            import pickle  # noqa: PLC0415
            import socket  # noqa: PLC0415

            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible  # CUDA is not initialised yet
            version = found = None
            try:
                import embstore  # noqa: PLC0415

                version = embstore.__version__
                with open(token) as file:  # noqa: PTH123
                    found = file.read(64)
            except (ImportError, OSError):
                pass
            return pickle.dumps(("hello", f"{socket.gethostname()} (process {os.getpid()})", version, found))

        def begin(self, job: bytes, number: int) -> bytes:
            """Start the job's worker, which loads its model or arrays."""
            import pickle  # noqa: PLC0415

            def start() -> None:
                self.worker = pickle.loads(job).start(number)

            return self.answer(start)

        def run(self, packed: bytes) -> bytes:
            """The result of a task; ``packed`` also contains the task that follows."""
            import pickle  # noqa: PLC0415

            task, following = pickle.loads(packed)
            return self.answer(lambda: self.worker.run(task, following=following, check=lambda: None))

        def answer(self, do: Callable[[], object]) -> bytes:
            """The result of a call, or how it failed."""
            import pickle  # noqa: PLC0415

            from embstore.core.errors import EmbstoreError  # noqa: PLC0415

            try:
                return pickle.dumps(("done", do()), protocol=5)
            except EmbstoreError as error:
                return pickle.dumps(("refused", type(error).__name__, error.message, error.hint))
            except Exception as error:  # noqa: BLE001 - the driver decides
                return pickle.dumps(("failed", type(error).__name__, str(error)[:2000]))

    return EmbstoreWorker


def refuse_missing() -> None:
    """Raise ConfigError if Ray is not installed."""
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
            f"worker processes need Ray, which is not installed ({error})",
            hint="pip install 'embstore[ray]', or --engine local",
        ) from error
    return ray


@contextlib.contextmanager
def _kept_handlers() -> Iterator[None]:
    """Restore the signal handlers that Ray replaces."""
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
    """The value of a worker's CUDA_VISIBLE_DEVICES for this device of this machine; None leaves it unchanged."""
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return None
    visible = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    if not visible:
        return index
    if int(index) >= len(visible):
        raise ConfigError(
            f"device {name} does not exist: CUDA_VISIBLE_DEVICES shows {len(visible)} devices",
            hint=f"use cuda:0 to cuda:{len(visible) - 1}, or change CUDA_VISIBLE_DEVICES",
        )
    return visible[int(index)]


def _free_resources() -> str:
    free = _ray().available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {words_of(error) if str(error).strip() else 'without a message'}"
