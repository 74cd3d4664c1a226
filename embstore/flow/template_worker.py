"""A process that renders chats, started by ``python -m``: unlike a forked or spawned one it runs nothing of the caller's.

A fork would copy the threads' locks of torch, and multiprocessing's spawn runs the main module again, which a script without
a guard does not survive. Requests and answers are pickled over pipes between this program and itself.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from embstore.core.interfaces import ChatTemplate

if TYPE_CHECKING:
    from embstore.flow.template_check import Block, Rendered


class WorkerLostError(Exception):
    """The process ended, or never began."""


class TemplateWorker:
    """One such process. It is started by the first request and ended by ``stop``."""

    def __init__(self, template: ChatTemplate, path: Path) -> None:
        self._template, self._path = template, path
        self._process: subprocess.Popen[bytes] | None = None
        self._is_lost = False

    def render(self, block: Block) -> Rendered:
        """As ``render_block``.

        Raises
        ------
        WorkerLostError
        """
        if self._is_lost:
            raise WorkerLostError
        try:
            process = self._process or self._start()
            _send(process.stdin, block)
            answer: Rendered = pickle.load(process.stdout)  # type: ignore[arg-type]
        except Exception as error:  # whatever a tokenizer's own pickling raises, or a process that is gone
            self._is_lost = True
            raise WorkerLostError from error
        return answer

    def stop(self) -> None:
        """End the process; a request under way raises WorkerLostError."""
        self._is_lost = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def _start(self) -> subprocess.Popen[bytes]:
        if not sys.executable:
            raise WorkerLostError
        search = {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        self._process = subprocess.Popen(
            # -P: a file in the current folder is not taken for a module
            [sys.executable, "-P", "-m", "embstore.flow.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **search, "TOKENIZERS_PARALLELISM": "false"},
        )
        _send(self._process.stdin, (self._template, self._path))
        return self._process


def _send(pipe: Any, value: object) -> None:  # noqa: ANN401 - a pipe, or None in mypy's eyes
    pipe.write(pickle.dumps(value))
    pipe.flush()


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the pipe ends."""
    from embstore.flow.template_check import render_block  # noqa: PLC0415 - it imports this module

    template, path = pickle.load(requests)
    while True:
        try:
            block = pickle.load(requests)
        except EOFError:
            return
        _send(answers, render_block(path, block, template))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    with contextlib.suppress(BrokenPipeError):
        main(sys.stdin.buffer, answers)
