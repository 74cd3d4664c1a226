"""One run of a build or a dry run: what every stage needs, and the figures of the final report."""

from __future__ import annotations

import contextlib
import platform
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from embstore.core.config import BuildConfig
from embstore.core.events import PREPARATIONS, Event, Observer, StageFinished
from embstore.core.format import PROMPTS
from embstore.core.interfaces import EmbedderSource, Engine
from embstore.core.spec import StoreSpec
from embstore.engines.local import LocalEngine
from embstore.engines.ray import RayEngine
from embstore.host.memory import MemoryMeter
from embstore.host.signals import StopSignals
from embstore.storage.atomic import make_directory, remove_busy_folder
from embstore.storage.chunk_writer import WORKER_FOLDERS
from embstore.storage.prompt_table import PromptTable
from embstore.storage.writer import StoreWriter


@dataclass(kw_only=True, slots=True)
class RunContext:
    """What decides about a build, whether it is made or only planned.

    ``device`` is where this run computes, with its index. The spec pins only the kind: another GPU of the same model gives
    the same bytes. ``seconds`` maps stages to their duration so far.
    """

    config: BuildConfig
    source: EmbedderSource | None
    observer: Observer
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # closed when the run ends
    is_exact: bool = False

    def compute_exactly(self, *, needs_torch: bool) -> None:
        """From here on products have full precision, until the build ends: see ``host.numerics``.

        Does nothing if torch is neither needed nor loaded. Whoever gives or finds a model has loaded it.
        """
        if self.is_exact or not (needs_torch or "torch" in sys.modules):
            return
        from embstore.host.numerics import exact_arithmetic  # noqa: PLC0415 - imports torch

        self.resources.enter_context(exact_arithmetic())
        self.is_exact = True


@dataclass(kw_only=True, slots=True)
class Run(RunContext):
    """State of one run of a build, shared by its stages, and the figures of the final report."""

    writer: StoreWriter
    stop: StopSignals
    meter: MemoryMeter
    embedded_rows: int = 0
    reused_rows: int = 0
    embedded_tokens: int = 0
    stored_bytes: int = 0
    worker_peak_bytes: int | None = None
    prompts_peak_bytes: int | None = None
    model_peak_bytes: int | None = None
    engine: Engine = field(default_factory=LocalEngine)
    engine_folder: Path = Path()  # of a remote engine, in the store: shared by the workers of this run
    read_prompts: PromptTable | None = None  # once their file was read in this run

    @property
    def prompts(self) -> PromptTable:
        """The committed prompts."""
        record = self.writer.state.prompts
        if record is None:
            raise AssertionError("no prompts are committed")
        if self.read_prompts is None:
            self.read_prompts = PromptTable(self.writer.root / PROMPTS, record.rows)
        return self.read_prompts

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage of this run that has other stages in it, or sends its own events."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def log_start(self) -> None:
        """Log when, where and with which model this run started; a later resume finds the model here."""
        embedding = self.config.embedding
        local = embedding.model is not None and Path(embedding.model).exists()
        self.writer.log_run(
            {
                "event": "started",
                "time": time.time(),
                "host": socket.gethostname(),
                "platform": platform.platform(),
                "python": platform.python_version(),
                "model": str(Path(embedding.model).absolute()) if embedding.model and local else embedding.model,
                "revision": embedding.revision,
                "reuse": [str(Path(path).absolute()) for path in self.config.reuse],
                "memory_budget_bytes": self.config.memory_budget_bytes,
            }
        )


@contextlib.contextmanager
def open_run(
    root: Path,
    config: BuildConfig,
    *,
    source: EmbedderSource | None,
    resume: bool,
    observer: Observer,
    seconds: dict[str, float],
) -> Iterator[Run]:
    """A run that writes the store at ``root``: from the lock on, until what it opened is closed again."""
    with (
        StopSignals() as stop,
        MemoryMeter() as meter,
        StoreWriter(root, resume=resume) as writer,
        contextlib.ExitStack() as closing,
    ):
        yield Run(
            writer=writer,
            config=config,
            source=source,
            observer=observer,
            stop=stop,
            meter=meter,
            seconds=seconds,
            resources=closing,
        )


def timed(observer: Observer, seconds: dict[str, float]) -> Observer:
    """The same observer; what each preparation takes is added to ``seconds``."""

    def observe(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage in PREPARATIONS:
            seconds[event.stage] = seconds.get(event.stage, 0.0) + event.seconds
        observer(event)

    return observe


@contextlib.contextmanager
def open_engine(run: Run, spec: StoreSpec) -> Iterator[None]:
    """Give the run its engine, and the engine a folder in the store, until the build ends.

    The folder is new in every run, and the next writer removes it: files that workers of a dead driver still write end up
    there and are never used.
    """
    if not run.config.engine.is_remote:
        yield
        return
    run.engine_folder = run.writer.work.absolute() / f"{WORKER_FOLDERS}{secrets.token_hex(8)}"
    make_directory(run.engine_folder)
    engine = RayEngine(
        run.config.engine, threads=spec.embedding.threads, device=spec.embedding.device, shared=run.engine_folder
    )
    run.engine = engine
    try:
        yield
    finally:
        engine.close()
        remove_busy_folder(run.engine_folder)
