"""What a test runs in a process of its own, to kill it: actions on a store with the fake embedder.

Each action tells its parent what happens, a line at a time and flushed: ``ready`` before the first system call on the store,
``stage NAME`` when a stage after the preflight begins, ``computing START STOP`` for a window that the embedder is asked for,
``committed START STOP`` for one that is acknowledged, ``hint TEXT`` and ``error KIND: message`` for an expected fault.

``python -m tests.support.build_fake ACTION STORE [PROMPTS]`` runs one from a shell.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig, WeightingConfig
from embstore.core.errors import EmbstoreError
from embstore.core.events import PREPARATIONS, Event, RowsCommitted, StageStarted
from embstore.flow.artifact import recompute_weights
from embstore.flow.build import build
from embstore.views.info import verify
from tests.support.fake import FakeSource

CONFIG = BuildConfig(
    embedding=EmbeddingConfig(model="fake", chunk_rows=16, window_rows=32), density=DensityConfig(knn="exact")
)
CONFIG_HNSW = dataclasses.replace(CONFIG, density=DensityConfig(knn="hnsw", shards=3))

# named by the environment: the old store of "build-reuse", and the model of "build-real"
REUSE = "EMBSTORE_TEST_REUSE"
MODEL = "EMBSTORE_TEST_MODEL"

Say = Callable[[str], None]
Action = Callable[[Path, "Path | None", Say], object]


class _Told(list[tuple[int, int]]):
    """Windows that were computed; says each as it begins."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self._say = say

    def append(self, window: tuple[int, int]) -> None:
        super().append(window)
        self._say(f"computing {window[0]} {window[1]}")


def _build(config: BuildConfig, *, reuses: bool = False) -> Action:
    def run(store: Path, prompts: Path | None, say: Say) -> object:
        settings = dataclasses.replace(config, reuse=(os.environ[REUSE],)) if reuses else config

        def tell(event: Event) -> None:
            if isinstance(event, RowsCommitted):
                say(f"committed {event.start} {event.stop}")
            elif isinstance(event, StageStarted) and event.stage not in PREPARATIONS:
                say(f"stage {event.stage}")

        source = FakeSource()
        source.calls = _Told(say)
        return build(prompts, out=store, config=settings, resume=True, observer=tell, source=source)

    return run


def _build_real(store: Path, prompts: Path | None, say: Say) -> object:
    def tell(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage not in PREPARATIONS:
            say(f"stage {event.stage}")

    embedding = dataclasses.replace(CONFIG.embedding, model=os.environ[MODEL], dtype="float32", device="cpu", threads=1)
    return build(prompts, out=store, config=dataclasses.replace(CONFIG, embedding=embedding), resume=True, observer=tell)


ACTIONS: Mapping[str, Action] = {
    "build": _build(CONFIG),
    "build-hnsw": _build(CONFIG_HNSW),
    "build-reuse": _build(CONFIG_HNSW, reuses=True),
    "build-real": _build_real,
    "weights": lambda store, prompts, say: recompute_weights(store, WeightingConfig(gamma=3)),
    "repair": lambda store, prompts, say: verify(store, repair=True),
}


def perform(action: str, store: Path, prompts: Path | None, say: Say) -> int:
    """Run one action; returns the exit code that the command line would give."""
    say("ready")
    try:
        ACTIONS[action](store, prompts, say)
    except EmbstoreError as error:
        say(f"hint {error.hint}")
        say(f"error {error.kind}: {error}")
        return int(error.exit_code)
    return 0


def say_on_stdout(line: str) -> None:
    """One flushed line on standard output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[2:]]
    sys.exit(perform(sys.argv[1], given[0], given[1] if len(given) > 1 else None, say_on_stdout))
