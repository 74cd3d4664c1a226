"""A build with the fake embedder in a process of its own, for tests that kill it.

``python -m tests.support.build_fake PROMPTS STORE`` prints ``ready`` once everything is imported, and a line for every
window that is acknowledged, flushed, so that the parent knows when work began and what must survive.
"""

from __future__ import annotations

import sys
from pathlib import Path

from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig
from embstore.core.errors import EmbstoreError
from embstore.core.events import Event, RowsCommitted
from embstore.pipeline import build
from tests.support.fake import FakeSource

CONFIG = BuildConfig(
    embedding=EmbeddingConfig(model="fake", chunk_rows=16, window_rows=32), density=DensityConfig(knn="exact")
)


def main(prompts: str, store: str) -> int:
    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    def tell(event: Event) -> None:
        if isinstance(event, RowsCommitted):
            say(f"committed {event.start} {event.stop}")

    say("ready")
    try:
        build(prompts, out=Path(store), config=CONFIG, resume=True, observer=tell, source=FakeSource())
    except EmbstoreError as error:
        sys.stderr.write(f"{error.kind}: {error}\n")
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
