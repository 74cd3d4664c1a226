"""The fake embedder where workers are processes of their own: what is computed is told through a file.

Instructions are files too, so that a test can tell workers of any process what to do: see ``Script``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embstore.core.config import EmbeddingConfig
from embstore.core.embedder import PromptReader, RowBlock
from embstore.core.events import Observer
from embstore.core.format import ModelIdentity
from embstore.core.prompts import Prompt
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
        """Before the window of this first row: ``kill``, ``raise``, ``refuse``, or ``sleep 3``; that many times."""
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
            verb, _, seconds = do.partition(" ")
            if verb == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif verb == "raise":
                raise RuntimeError("the device is out of order")
            elif verb == "sleep":
                time.sleep(float(seconds))
            return

    def tell(self, start: int, stop: int) -> None:
        """In a worker: a window is being computed."""
        handle = os.open(self.folder / "calls", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.write(handle, f"{start} {stop} {os.getpid()}\n".encode())
        os.close(handle)

    @property
    def calls(self) -> list[Call]:
        """Windows that were computed so far, in order."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [Call(*map(int, line.split())) for line in lines]


class ScriptedSource(FakeSource):
    """A fake source that can be pickled; its embedders follow a script."""

    def __init__(
        self, script: Path, *, model: ModelIdentity | None = None, capability: str = "FAKE", **options: Any
    ) -> None:
        super().__init__(**options)
        self.script = script
        self.model = model or self.model
        self.capability = capability
        self.wrong_capability_elsewhere: str | None = None
        self._pid = os.getpid()

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        elsewhere = self.wrong_capability_elsewhere if os.getpid() != self._pid else None
        return {**super().hardware(config), "capability": elsewhere or self.capability}

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> FakeEmbedder:
        made = super().create(prompts, config, memory_bytes=memory_bytes, work=work, observer=observer)
        return ScriptedEmbedder(self, made.spec, made.basis_VR)

    def reopen(self, *given: Any) -> FakeEmbedder:
        made = super().reopen(*given)
        return ScriptedEmbedder(self, made.spec, made.basis_VR)


class ScriptedEmbedder(FakeEmbedder):
    """Follows the script before each window."""

    def embed(self, prompts: Sequence[Prompt], *, first_row: int, **more: Any) -> Iterator[RowBlock]:
        source = self._source
        assert isinstance(source, ScriptedSource)
        script = Script(source.script)
        script.tell(first_row, first_row + len(prompts))
        script.follow(first_row)
        yield from super().embed(prompts, first_row=first_row, **more)
