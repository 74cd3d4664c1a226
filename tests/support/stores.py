"""Small stores on the fake embedder, and what tests compare about them.

70 rows in 5 chunks and 3 windows: short enough to build hundreds of times, with every kind of line a prompts file may hold.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.events import Event, Observer, RowsCommitted, ignore
from embstore.core.interfaces import PromptReader, RowBlock
from embstore.core.prompts import Prompt
from embstore.core.records import JournalRecord, decode_journal
from embstore.core.spec import EmbeddingSpec
from embstore.flow.build import BuildReport, build
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeEmbedder, FakeSource

NUM_ROWS = 70
NUM_CHUNKS = 5
WINDOWS = [(0, 32), (32, 64), (64, 70)]
# what describes runs rather than the artefact: outside the manifest, and allowed to differ
UNLISTED = {".lock", "runs.jsonl", "journal.jsonl"}


def small_lines() -> list[dict[str, Any]]:
    """Lines of the small prompts file: 70 rows, among them chats, explicit ids, shared vectors and shared derived ids."""
    lines: list[dict[str, Any]] = [{"prompt": f"Explain number {index}.", "src": "ab"[index % 2]} for index in range(60)]
    lines += [{"messages": [{"role": "user", "content": f"Explain chat {index}."}], "src": "chat"} for index in range(4)]
    lines += [{"id": f"given-{index}", "prompt": f"With an id {index}"} for index in range(2)]
    lines += [{"prompt": f"same: vector {index}"} for index in range(3)]
    lines.append({"messages": [{"role": "user", "content": "Explain number 0."}]})  # derives the id of row 0
    assert len(lines) == NUM_ROWS
    return lines


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    """A JSONL file; ``bytes`` go in as they are."""
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def write_small_prompts(path: Path) -> Path:
    """The 70 rows with repeats and bad lines between them."""
    lines: list[object] = list(small_lines())
    lines.insert(40, {"prompt": "  Explain number 3.\n", "id": "alias-3"})
    lines.insert(20, b"no JSON\n")
    lines.insert(10, {"prompt": "Explain number 3."})
    return write_lines(path, lines)


def build_small(
    prompts: Path | None,
    out: Path,
    *,
    source: FakeSource | None = None,
    config: BuildConfig = CONFIG,
    resume: bool = True,
    observer: Observer = ignore,
) -> BuildReport:
    """Build or continue a small store with a fresh fake embedder."""
    return build(prompts, out=out, config=config, resume=resume, observer=observer, source=source or FakeSource())


def with_embedding(**changes: Any) -> BuildConfig:
    """The small configuration with other embedding options."""
    return dataclasses.replace(CONFIG, embedding=dataclasses.replace(CONFIG.embedding, **changes))


def with_density(**changes: Any) -> BuildConfig:
    """The small configuration with other search options."""
    return dataclasses.replace(CONFIG, density=dataclasses.replace(CONFIG.density, **changes))


def with_weighting(**changes: Any) -> BuildConfig:
    """The small configuration with other weighting options."""
    return dataclasses.replace(CONFIG, weighting=dataclasses.replace(CONFIG.weighting, **changes))


def snapshot(root: Path) -> dict[str, str]:
    """Every file of the artefact by relative path: sha256 of its bytes, or where a link points."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file() and name not in UNLISTED:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def whole_tree(root: Path) -> dict[str, str]:
    """Like ``snapshot``, with the journal: what a refused run may not change."""
    return snapshot(root) | {"journal.jsonl": hashlib.sha256((root / "journal.jsonl").read_bytes()).hexdigest()}


def journal_records(root: Path) -> list[JournalRecord]:
    """Every record of a store's journal, in order."""
    return decode_journal((root / "journal.jsonl").read_bytes(), name="journal.jsonl")[0]


class Acknowledged:
    """An observer that keeps the windows it was told are durable."""

    def __init__(self) -> None:
        self.windows: list[tuple[int, int]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, RowsCommitted):
            self.windows.append((event.start, event.stop))


class HookedSource(FakeSource):
    """A fake source that calls ``hook(first_row)`` before each chunk is computed."""

    def __init__(self, hook: Callable[[int], None], like: FakeSource | None = None) -> None:
        super().__init__()
        if like is not None:
            vars(self).update(vars(like))
        self.hook = hook

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> FakeEmbedder:
        return self._hooked(super().create(prompts, config, memory_bytes=memory_bytes, work=work, observer=observer))

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], **options: Any) -> FakeEmbedder:
        return self._hooked(super().reopen(spec, basis_VR, **options))

    def _hooked(self, embedder: FakeEmbedder) -> FakeEmbedder:
        compute = embedder._block

        def block(prompts: Sequence[Prompt], first_row: int) -> RowBlock:
            self.hook(first_row)
            return compute(prompts, first_row)

        embedder._block = block  # type: ignore[method-assign]
        return embedder


class Stopped(Exception):
    """What tests raise to end a build part-way."""


def build_part(
    prompts: Path, out: Path, *, rows: int, config: BuildConfig = CONFIG, source: FakeSource | None = None
) -> Path:
    """A store whose windows before ``rows`` are committed and whose next one failed in the embedder."""

    def stop(first_row: int) -> None:
        if first_row >= rows:
            raise Stopped

    try:
        build_small(prompts, out, config=config, source=HookedSource(stop, source))
    except Stopped:
        return out
    raise AssertionError("the build ended before it could be stopped")
