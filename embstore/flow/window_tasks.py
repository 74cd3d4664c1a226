"""Windows as tasks: prompts in, chunks on disk, and the data of the commit out, wherever the model is loaded.

In this process a worker uses the embedder that is loaded. Workers in other processes load the model once, under the settings
pinned in the spec, after comparing model and hardware with it: a window has the same bytes wherever it is computed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import EngineError, RowError
from embstore.core.files import storage_errors
from embstore.core.format import PROMPTS
from embstore.core.interfaces import Check, Embedder, EmbedderSource, Needs, RowBlock, WindowCounts
from embstore.core.plan import as_stored, grid_of, hardware_mismatches, model_mismatches
from embstore.core.prompts import Prompt
from embstore.core.spec import StoreSpec
from embstore.flow.reuse import Reuse, SavedReuse, nothing_reused
from embstore.flow.row_copier import RowCopier
from embstore.host.memory import MemoryMeter
from embstore.storage.atomic import remove_busy_folder
from embstore.storage.chunk_writer import WindowWriter, WrittenWindow
from embstore.storage.prompt_table import PromptTable
from embstore.storage.row_files import map_basis

_NOTHING_COMPUTED = WindowCounts(tokens=0, truncated=0, splits=0)
_NAMED_PROMPTS = 3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MadeWindow:
    """A window to commit, and the peak of anonymous memory of its worker beyond the loaded model (None: unknown)."""

    written: WrittenWindow
    peak_anonymous_bytes: int | None


class WindowWorker:
    """Computes or copies the rows of one window after the other, and writes their chunks."""

    def __init__(
        self,
        root: Path,
        spec: StoreSpec,
        embedder: Embedder | None,
        reuse: Reuse,
        *,
        prompts: PromptTable,
        stops_at_failure: bool,
        work: Path,
        temps: Path | None = None,
        todo: Sequence[int] = (),
        meter: MemoryMeter | None = None,
        resources: contextlib.ExitStack | None = None,
    ) -> None:
        """``work`` is for scratch, ``temps`` for temp files of chunks (default: the folder of the chunks).

        ``todo`` are all windows that this worker will be given, where that is known, in their order. ``resources`` are
        closed with the worker.
        """
        self._spec, self._embedder, self._reuse, self._prompts = spec, embedder, reuse, prompts
        self._stops_at_failure = stops_at_failure
        self._writer = WindowWriter(root, spec, folder=temps)
        self._copier = RowCopier(reuse, spec, work)
        self._counts = _NOTHING_COMPUTED
        self._todo = todo
        self._position_of = {window: position for position, window in enumerate(todo)}
        self._read: dict[int, list[Prompt]] = {}  # prompts of windows for the model: announced ones keep their objects
        self._resources = resources or contextlib.ExitStack()
        self._meter = meter
        if meter is not None:
            self._resources.enter_context(meter)
            meter.set_baseline()

    def run(self, task: int, *, following: int | None, check: Check) -> MadeWindow:
        """Write the window's chunks; see ``storage.chunk_writer``.

        Raises
        ------
        RowError
            A prompt failed in the model, and failed rows are not quarantined.
        """
        if not self._todo:  # what was announced may have gone to another worker
            self._read = {window: prompts for window, prompts in self._read.items() if window == task}
        given = self._missing(task)
        blocks = self._blocks(task, given, check, self._announced(task, following))
        rows = grid_of(self._spec).window(task)
        written = self._writer.write(
            task, self._refuse_failed(blocks), lambda: self._counts, reused=self._reuse.ranges(rows)
        )
        self._read.pop(task, None)
        return MadeWindow(written=written, peak_anonymous_bytes=self._meter.peak_anonymous_bytes if self._meter else None)

    def close(self) -> None:
        """Stop background work and delete scratch files."""
        with self._resources:
            if self._embedder is not None:
                self._embedder.close()
            self._copier.close()
            self._writer.close()

    def _missing(self, window: int) -> list[Prompt]:
        """Prompts of a window for the model: the same objects that were announced to it as ``following``."""
        if window not in self._read:
            rows = grid_of(self._spec).window(window)
            needed = set(self._reuse.missing(rows).tolist())
            prompts = self._prompts.read(rows) if needed else []
            self._read[window] = [prompt for row, prompt in enumerate(prompts, rows.start) if row in needed]
        return self._read[window]

    def _announced(self, window: int, following: int | None) -> Iterator[list[Prompt]]:
        """Prompts of the windows after this one, read as they are asked for; a window that is copied has none."""
        position = self._position_of.get(window)
        later = (self._todo[each] for each in range(position + 1, len(self._todo))) if position is not None else (following,)
        return (prompts for each in later if each is not None and (prompts := self._missing(each)))

    def _blocks(
        self, window: int, given: Sequence[Prompt], check: Check, following: Iterable[Sequence[Prompt]]
    ) -> Iterator[RowBlock]:
        """All rows of a window; the counts are valid once they are exhausted."""
        rows = grid_of(self._spec).window(window)
        is_mixed = len(given) < rows.num_rows
        computed: Iterator[RowBlock] = iter(())
        self._counts = _NOTHING_COMPUTED
        if given:
            if self._embedder is None:
                raise AssertionError("rows remain, but there is no embedder")
            chunk_rows = self._copier.computed_chunk_rows if is_mixed else self._spec.chunk_rows
            computed = self._embedder.embed(
                given, first_row=rows.start, chunk_rows=chunk_rows, check=check, following=following
            )
        yield from self._copier.blocks(window, computed) if is_mixed else computed
        if given and self._embedder is not None:
            self._counts = self._embedder.counts

    def _refuse_failed(self, blocks: Iterator[RowBlock]) -> Iterator[RowBlock]:
        """Pass blocks on; without quarantine, a failed row stops the run before its chunk is written."""
        for block in blocks:
            if block.failed and self._stops_at_failure:
                failed = block.failed[0]
                prompt = self._prompts.sample([failed.row])[0]
                raise RowError(
                    f"prompt {prompt.id!r} (row {failed.row}) failed: {failed.reason}",
                    hint="resume with --on-error quarantine to keep its row number without a vector, or remove the prompt",
                )
            yield block


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalWindowJob:
    """The windows of a build in one process: the worker uses the embedder that is loaded."""

    root: Path
    spec: StoreSpec
    prompts: PromptTable
    embedder: Embedder | None
    reuse: Reuse
    stops_at_failure: bool
    work: Path
    todo: tuple[int, ...] = ()
    needs: Needs = "device"

    def start(self, number: int) -> WindowWorker:
        """A worker in this process."""
        return WindowWorker(
            self.root,
            self.spec,
            self.embedder,
            self.reuse,
            prompts=self.prompts,
            stops_at_failure=self.stops_at_failure,
            work=self.work,
            todo=self.todo,
        )

    def name(self, task: int) -> str:
        """The window, its rows, and the ids of its first and last prompts."""
        return name_window(self.root, self.spec, task)

    def lost(self, number: int) -> None:
        """Does nothing: the worker is this process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteWindowJob:
    """The windows of workers in other processes, on machines that see the store and the model under the same paths.

    ``folder`` belongs to the driver and lies in the store: it contains the files that workers map, and a folder for the temp
    files of each worker. A worker creates that folder once and cannot publish a chunk without it, so a worker that was given
    up can never overwrite a committed chunk.
    """

    root: Path
    spec: StoreSpec
    source: EmbedderSource | None
    reuse: SavedReuse | None
    stops_at_failure: bool
    folder: Path
    memory_bytes: int = 0
    needs: Needs = "device"

    @classmethod
    def prepare(
        cls,
        root: Path,
        spec: StoreSpec,
        source: EmbedderSource | None,
        reuse: Reuse,
        *,
        prompts: PromptTable,
        stops_at_failure: bool,
        folder: Path,
        memory_bytes: int,
    ) -> RemoteWindowJob:
        """Write the files that workers map: offsets of rows in ``prompts.jsonl``, and origins of copied rows."""
        with storage_errors("writing to", folder):
            np.save(folder / "offsets.npy", prompts.offsets)
        saved = SavedReuse.save(reuse, folder) if reuse.stores else None
        return cls(
            root=root,
            spec=spec,
            source=source,
            reuse=saved,
            stops_at_failure=stops_at_failure,
            folder=folder,
            memory_bytes=memory_bytes,
        )

    def start(self, number: int) -> WindowWorker:
        """As ``Job``: load the model in the process that will use it.

        Raises
        ------
        EngineError
            Model or hardware differ from the spec, so rows would have other bytes.
        StorageError
            This worker was given up before it started, or its driver is gone.
        """
        own = self.folder / str(number)
        with storage_errors("creating folder", own):
            own.mkdir()  # without parents: a removed driver's folder must not come back
        with contextlib.ExitStack() as opening:
            embedder = None
            if self.source is not None:
                _compute_exactly(opening)
                self._refuse_other(self.source)
                # on this process's own device
                basis_VR = map_basis(self.root, self.spec.embedding)
                embedder = self.source.reopen(self.spec.embedding, basis_VR, memory_bytes=self.memory_bytes)
            offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
            return WindowWorker(
                self.root,
                self.spec,
                embedder,
                self.reuse.open(self.root) if self.reuse is not None else nothing_reused(self.spec.rows),
                prompts=PromptTable(self.root / PROMPTS, self.spec.rows, offsets=offsets),
                stops_at_failure=self.stops_at_failure,
                work=own,
                temps=own,
                meter=MemoryMeter(),
                resources=opening.pop_all(),
            )

    def name(self, task: int) -> str:
        """The window, its rows, and the ids of its first and last prompts."""
        return name_window(self.root, self.spec, task)

    def lost(self, number: int) -> None:
        """As ``Job``: a file takes the place of the worker's folder, so that the worker can never start."""
        own = self.folder / str(number)
        with storage_errors("removing", own), contextlib.suppress(FileNotFoundError):  # the driver's folder is gone
            while True:
                try:
                    os.close(os.open(own, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
                except FileExistsError:
                    remove_busy_folder(own)
                else:
                    return

    def _refuse_other(self, source: EmbedderSource) -> None:
        embedding = self.spec.embedding
        asked = EmbeddingConfig(device=embedding.device, threads=embedding.threads)
        found = as_stored(source.hardware(asked), embedding)
        unlike = [
            f"{each.field} {each.given} here, {each.stored} in the store's spec"
            for each in hardware_mismatches(embedding, found)
        ]
        unlike += [
            f"{each.field} {str(each.given)[:16]} here, {str(each.stored)[:16]} in the store's spec"
            for each in model_mismatches(self.spec.model, source.identity())
        ]
        if unlike:
            raise EngineError(
                f"this worker would compute different rows: {'; '.join(unlike)}",
                hint="use identical machines, versions and models, then run the command again with --resume",
            )


def _compute_exactly(resources: contextlib.ExitStack) -> None:
    """Full precision until the worker is closed, where torch computes: a source that needs it has loaded it."""
    if "torch" in sys.modules:
        from embstore.host.numerics import full_precision  # noqa: PLC0415

        resources.enter_context(full_precision())  # not of this thread alone: its workers may be closed in any order


def name_window(root: Path, spec: StoreSpec, window: int) -> str:
    """A window as people read it: its rows, and the ids of its first and last prompts."""
    rows = grid_of(spec).window(window)
    wanted = range(rows.start, rows.stop)
    shown = list(wanted) if len(wanted) <= _NAMED_PROMPTS + 1 else [*wanted[:_NAMED_PROMPTS], wanted[-1]]
    ids = [repr(prompt.id) for prompt in PromptTable(root / PROMPTS, spec.rows).sample(shown)]
    if len(wanted) > len(shown):
        ids.insert(-1, "...")
    return f"window {window} (rows {rows.start} to {rows.stop - 1}, prompts {', '.join(ids)})"
