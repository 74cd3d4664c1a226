"""Children that differ from others in one thing: a sync left out, a preflight that sees an empty disk, a real model.

What differs is said in the environment of each child (``environment=`` of ``ForkServer.start``). An expected error is
followed by its hint: ``hint TEXT``. ``python -m tests.support.mutated`` is the server.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from embstore.core.errors import EmbstoreError
from embstore.core.events import Event, StageStarted
from embstore.flow.build import build
from tests.support import build_fake, fork_server
from tests.support.build_fake import CONFIG, Action, Say

LEAVE_OUT = "EMBSTORE_TEST_LEAVE_OUT"
BLIND = "EMBSTORE_TEST_BLIND"
MODEL = "EMBSTORE_TEST_MODEL"
_FREE_BYTES = 1 << 40


def without(call: str, pattern: str) -> dict[str, str]:
    """The environment of a child whose ``call`` does nothing on paths in the store that match a shell pattern.

    A folder's path ends in a slash.
    """
    return {LEAVE_OUT: f"{call} {pattern}"}


class MutatedServer(fork_server.ForkServer):
    """A fork server whose children obey the environment above; ``torch``: imported once, for the action "build-real"."""

    def __init__(self, *, torch: bool = False) -> None:
        self._argument = ["torch"] if torch else []

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="embstore-fork-")
        command = [sys.executable, "-m", "tests.support.mutated", *self._argument]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self


def _perform(action: str, store: Path, prompts: Path | None, say: Say) -> int:
    if LEAVE_OUT in os.environ:
        call, pattern = os.environ[LEAVE_OUT].split(" ", 1)
        _leave_out(call, pattern, store)
    if BLIND in os.environ:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=_FREE_BYTES)
    return build_fake.perform(action, store, prompts, say)


def _leave_out(call: str, pattern: str, store: Path) -> None:
    real: Callable[[int], None] = getattr(os, call)

    def sync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        name = os.path.relpath(path, store) + ("/" if path.is_dir() else "")
        if not fnmatch.fnmatch(name, pattern):
            real(handle)

    setattr(os, call, sync)


def _build_real(store: Path, prompts: Path | None, say: Say) -> object:
    def tell(event: Event) -> None:
        if isinstance(event, StageStarted):
            say(f"stage {event.stage}")

    embedding = dataclasses.replace(CONFIG.embedding, model=os.environ[MODEL], dtype="float32", device="cpu", threads=1)
    return build(prompts, out=store, config=dataclasses.replace(CONFIG, embedding=embedding), resume=True, observer=tell)


def _with_hint(action: Action) -> Action:
    def run(store: Path, prompts: Path | None, say: Say) -> Any:
        try:
            return action(store, prompts, say)
        except EmbstoreError as error:
            say(f"hint {error.hint}")
            raise

    return run


if __name__ == "__main__":
    if "torch" in sys.argv:
        # so that children start in milliseconds; nothing is computed here, so no thread of torch is lost in a fork
        importlib.import_module("embstore.model.source")
        transformers = importlib.import_module("transformers")
        for name in ("LlamaForCausalLM", "NanoChatForCausalLM", "PreTrainedTokenizerFast"):
            getattr(transformers, name)
    known = {**build_fake.ACTIONS, "build-real": _build_real}
    build_fake.ACTIONS = {name: _with_hint(action) for name, action in known.items()}
    vars(fork_server)["perform"] = _perform
    fork_server._serve()
