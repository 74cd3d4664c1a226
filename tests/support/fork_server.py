"""Builds in processes of their own, started in milliseconds: a server imports everything once and forks a child for each.

The child is a whole process: it can be killed, traced and cut off from its disk. It reports through a named pipe: every
line its parent reads was said before the fault. Its environment may make it differ from others in one thing: a sync is left
out (``without``), or its preflight sees an empty disk (``BLIND``). ``python -m tests.support.fork_server`` is the server.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Self

from embstore.core import files
from tests.support.build_fake import perform
from tests.support.stores import write_small_prompts

LEAVE_OUT = "EMBSTORE_TEST_LEAVE_OUT"
BLIND = "EMBSTORE_TEST_BLIND"
_HANGS_SECONDS = 600.0
_FREE_BYTES = 1 << 40


def without(call: str, pattern: str) -> dict[str, str]:
    """The environment of a child whose ``call`` does nothing on paths in the store that match a shell pattern.

    A folder's path ends in a slash.
    """
    return {LEAVE_OUT: f"{call} {pattern}"}


class Child:
    """One running action; ``lines`` is what it said so far."""

    def __init__(self, server: ForkServer, pid: int, handle: int) -> None:
        self.pid = pid
        self.lines: list[str] = []
        self._server = server
        self._handle = handle
        self._pending = b""
        self._code: int | None = None

    @property
    def acknowledged(self) -> set[tuple[int, int]]:
        """Windows (start, stop) that it said are committed."""
        return self._windows("committed")

    @property
    def computed(self) -> set[tuple[int, int]]:
        """Windows (start, stop) that its embedder was asked for."""
        return self._windows("computing")

    def _windows(self, word: str) -> set[tuple[int, int]]:
        said = (line.split() for line in self.lines)
        return {(int(words[1]), int(words[2])) for words in said if words[0] == word}

    def read(self, *, wait_seconds: float = 0.0) -> bool:
        """Take what it said by now; waits for the first of it. False at the end of its life."""
        if not select.select([self._handle], [], [], wait_seconds)[0]:
            return True
        data = os.read(self._handle, 1 << 16)
        *lines, self._pending = (self._pending + data).split(b"\n")
        self.lines += [line.decode() for line in lines]
        return bool(data)

    def wait_for(self, start: str) -> bool:
        """Block until it says a line beginning with ``start``; False if it ends before."""
        deadline = time.monotonic() + _HANGS_SECONDS
        while not any(line.startswith(start) for line in self.lines):
            if not self.read(wait_seconds=1.0):
                return False
            assert time.monotonic() < deadline, f"waited {_HANGS_SECONDS} s for {start!r}, heard {self.lines}"
        return True

    def resume(self) -> None:
        """Let a child that was started ``held`` begin."""
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; also to one that just ended, for it is not reaped before its status was asked for."""
        os.kill(self.pid, number)

    def kill(self) -> int:
        """SIGKILL, then as ``wait``."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Exit code, or minus the signal that ended it; everything it said is in ``lines``."""
        if self._code is None:
            while self.read(wait_seconds=_HANGS_SECONDS):
                pass
            os.close(self._handle)
            self._code = self._server._reap()
        return self._code


class ForkServer:
    """Starts children one after another; use as a context manager.

    ``warm``: the server does everything once before its first child, so that a trace shows no import. ``torch``: it has
    imported what the action "build-real" needs.
    """

    def __init__(self, *, warm: bool = False, torch: bool = False) -> None:
        self._options = [*(["warm"] if warm else []), *(["torch"] if torch else [])]

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="embstore-fork-")
        command = [sys.executable, "-m", "tests.support.fork_server", *self._options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=_HANGS_SECONDS)
        self._process.stdout.close()
        self._folder.cleanup()

    def start(
        self,
        action: str,
        store: Path,
        prompts: Path | None = None,
        *,
        held: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Child:
        """Fork a child that performs ``action``; ``held`` stops it before it begins, so that a tracer may attach.

        ``environment`` is added to the child's.
        """
        pipe = Path(self._folder.name) / "said"
        os.mkfifo(pipe)
        handle = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        request = {
            "action": action,
            "store": str(store),
            "prompts": str(prompts) if prompts else None,
            "pipe": str(pipe),
            "held": held,
            "environment": environment or {},
        }
        pid = int(self._ask(json.dumps(request)))
        pipe.unlink()
        os.set_blocking(handle, True)
        return Child(self, pid, handle)

    def run(self, action: str, store: Path, prompts: Path | None = None) -> Child:
        """Perform ``action`` to its end."""
        child = self.start(action, store, prompts)
        child.wait()
        return child

    def _reap(self) -> int:
        return int(self._ask("reap"))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def _serve() -> None:
    """Answer each request with the pid of its child, and each "reap" with the status of the last child."""
    child = 0
    for line in sys.stdin:
        if line == "reap\n":
            _, status = os.waitpid(child, 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            request = json.loads(line)
            pipe = os.open(request["pipe"], os.O_WRONLY)
            child = os.fork()
            if child == 0:
                _be_child(request, pipe)
            os.close(pipe)
            if request["held"]:
                os.waitpid(child, os.WUNTRACED)
            answer = child
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _be_child(request: dict[str, object], pipe: int) -> None:
    code = 70  # what no embstore error returns
    try:
        os.environ.update(request["environment"])  # type: ignore[arg-type]
        # a tracer must know the names of temporary files before they are made
        files.secrets = SimpleNamespace(token_hex=lambda size: f"{os.getpid():08}")  # type: ignore[assignment]
        if request["held"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        prompts = Path(str(request["prompts"])) if request["prompts"] else None
        store = Path(str(request["store"]))
        _obey_environment(store)
        code = perform(str(request["action"]), store, prompts, lambda text: _write(pipe, text))
    except BaseException as error:  # noqa: BLE001 - reported to the parent, whatever it is
        _write(pipe, f"traceback {error!r}")
    finally:
        os._exit(code)


def _write(pipe: int, text: str) -> None:
    os.write(pipe, f"{text}\n".encode())


def _obey_environment(store: Path) -> None:
    if LEAVE_OUT in os.environ:
        call, pattern = os.environ[LEAVE_OUT].split(" ", 1)
        _leave_out(call, pattern, store)
    if BLIND in os.environ:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=_FREE_BYTES)


def _leave_out(call: str, pattern: str, store: Path) -> None:
    real: Callable[[int], None] = getattr(os, call)

    def sync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        name = os.path.relpath(path, store) + ("/" if path.is_dir() else "")
        if not fnmatch.fnmatch(name, pattern):
            real(handle)

    setattr(os, call, sync)


def _warm_up() -> None:
    with tempfile.TemporaryDirectory(prefix="embstore-warm-") as folder:
        prompts = write_small_prompts(Path(folder) / "prompts.jsonl")
        for action in ("build-hnsw", "weights"):
            perform(action, Path(folder) / "store", prompts, lambda line: None)


def _import_torch() -> None:
    """Nothing is computed here, so no thread of torch is lost in a fork."""
    importlib.import_module("embstore.model.source")
    transformers = importlib.import_module("transformers")
    for name in ("LlamaForCausalLM", "NanoChatForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)


if __name__ == "__main__":
    if "warm" in sys.argv:
        _warm_up()
    if "torch" in sys.argv:
        _import_torch()
    _serve()
