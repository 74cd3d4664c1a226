"""The fake embedder where workers are processes of their own: what is computed is told through a file.

Instructions are files too, so that a test can tell workers of any process what to do: see ``Script``.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError
from embstore.core.events import Observer, ignore
from embstore.core.interfaces import Check, Needs, PromptReader, RowBlock
from embstore.core.prompts import Prompt
from embstore.core.spec import ModelIdentity
from tests.support.fake import FakeEmbedder, FakeSource


@dataclass(frozen=True, slots=True)
class Call:
    """A window that an embedder was asked for: its rows, and the process."""

    start: int
    stop: int
    pid: int


class Script:
    """A folder that workers look into: what they are to do at a row, and what they did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def at(self, row: int, do: str, *, times: int = 1) -> Script:
        """At this number or before the window of this row: ``kill``, ``raise``, ``refuse``, ``sleep 3`` or ``await 40``.

        Whoever awaits goes on when so many windows have begun.
        """
        for number in range(times):
            (self.folder / f"{row}-{number}").write_text(do)
        return self

    def follow(self, row: int) -> None:
        """In a worker: do what is to be done, each instruction once."""
        for path in sorted(self.folder.glob(f"{row}-*")):
            try:
                do = path.read_text()
                path.unlink()
            except FileNotFoundError:  # another worker was faster
                continue
            verb, _, number = do.partition(" ")
            if verb == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif verb == "raise":
                raise RuntimeError("the device is out of order")
            elif verb == "refuse":
                raise ModelError("the model cannot do this", hint="take another one")
            elif verb == "sleep":
                time.sleep(float(number))
            elif verb == "await":
                while len(self.calls) < int(number):
                    time.sleep(0.01)
            return

    def tell(self, start: int, stop: int) -> None:
        """In a worker: a window is being computed."""
        handle = os.open(self.folder / "calls", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.write(handle, f"{start} {stop} {os.getpid()}\n".encode())
        os.close(handle)

    def is_first(self, what: str) -> bool:
        """In a worker: whether nobody asked this before."""
        try:
            os.close(os.open(self.folder / what, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    @property
    def calls(self) -> list[Call]:
        """Windows that were computed so far, in order."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [Call(*map(int, line.split())) for line in lines]


@dataclass(frozen=True, slots=True)
class Squares:
    """A job whose tasks are numbers; each worker follows the script at every number, and says which one was to follow."""

    script: Path
    needs: Needs = "core"

    def start(self, number: int) -> _Squarer:
        return _Squarer(self, number)

    def name(self, task: int) -> str:
        return f"number {task}"

    def lost(self, number: int) -> None:
        (self.script / f"lost-{number}").touch()


class _Squarer:
    def __init__(self, job: Squares, number: int) -> None:
        self._script, self._number = Script(job.script), number
        self._promised: int | None = None

    def run(self, task: int, *, following: int | None, check: Check) -> tuple[int, int, bool]:
        """The square, the worker's number, and whether it was promised this task."""
        check()
        self._script.tell(task, task + 1)
        self._script.follow(task)
        was_promised, self._promised = self._promised == task, following
        return task**2, self._number, was_promised

    def close(self) -> None:
        (self._script.folder / f"closed-{self._number}").touch()


class ScriptedSource(FakeSource):
    """A fake source that can be pickled; its embedders follow a script."""

    def __init__(
        self, script: Path, *, model: ModelIdentity | None = None, capability: str = "FAKE", **options: Any
    ) -> None:
        super().__init__(**options)
        self.script = script
        self.model = model or self.model
        self.capability = capability
        # what is otherwise in processes that did not make this object
        self.wrong_capability_elsewhere: str | None = None
        self.other_weights_elsewhere = False
        self.dies_elsewhere = False
        self.killed_at_chunk: int | None = None  # of the window of row 32, with a temp file open
        self._pid = os.getpid()

    @property
    def is_elsewhere(self) -> bool:
        return os.getpid() != self._pid

    def identity(self, observer: Observer = ignore) -> ModelIdentity:
        is_other = self.other_weights_elsewhere and self.is_elsewhere
        return dataclasses.replace(self.model, weights_sha256="x" * 64) if is_other else self.model

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        if self.dies_elsewhere and self.is_elsewhere:
            os.kill(os.getpid(), signal.SIGKILL)
        elsewhere = self.wrong_capability_elsewhere if self.is_elsewhere else None
        return {**super().hardware(config), "capability": elsewhere or self.capability}

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> FakeEmbedder:
        made = super().create(prompts, config, memory_bytes=memory_bytes, work=work, observer=observer)
        return ScriptedEmbedder(self, made.spec, made.basis_VR)

    def reopen(self, *given: Any, **options: Any) -> FakeEmbedder:
        made = super().reopen(*given, **options)
        return ScriptedEmbedder(self, made.spec, made.basis_VR)


class ScriptedEmbedder(FakeEmbedder):
    """Follows the script before each window."""

    def embed(self, prompts: Sequence[Prompt], *, first_row: int, **more: Any) -> Iterator[RowBlock]:
        source = self._source
        assert isinstance(source, ScriptedSource)
        script = Script(source.script)
        script.tell(first_row, first_row + len(prompts))
        script.follow(first_row)
        for number, block in enumerate(super().embed(prompts, first_row=first_row, **more)):
            if number == source.killed_at_chunk and first_row == 32 and script.is_first("killed"):
                kill_at_next_rename()
            yield block


def kill_at_next_rename() -> None:
    """The process dies when the next chunk is written, synced, and about to get its name."""

    def rename(*names: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    os.rename = rename
