"""Which windows are left, and whether a resume is about the same store. Pure: values in, values or a refusal out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import CorruptStoreError, FieldMismatch, IdentityMismatchError
from embstore.core.records import JournalState, WindowRecord
from embstore.core.rows import RowGrid, RowRange
from embstore.core.spec import EmbeddingSpec, ModelIdentity, StoreSpec, diff_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """What remains of the embedding stage: the windows to compute, in row order."""

    grid: RowGrid
    windows: tuple[int, ...]

    @property
    def remaining_rows(self) -> int:
        """Rows still to be computed."""
        return sum(self.grid.window(window).num_rows for window in self.windows)


def grid_of(spec: StoreSpec) -> RowGrid:
    """The row grid pinned in a spec."""
    return RowGrid(num_rows=spec.rows, window_rows=spec.window_rows, chunk_rows=spec.chunk_rows)


def misfit(grid: RowGrid, record: WindowRecord) -> bool:
    """Whether a committed window differs from the grid's window of that number, or has other chunks."""
    if record.window >= grid.num_windows or grid.window(record.window) != RowRange(record.start, record.stop):
        return True
    return [chunk.index for chunk in record.chunks] != [index for index, _ in grid.chunks(record.window)]


def refuse_misfits(spec: StoreSpec, state: JournalState) -> None:
    """Refuse a journal that is about other rows than the spec, so that no later code has to check a window's range.

    Raises
    ------
    CorruptStoreError
        A window does not fit the grid, or stage 0 committed another number of rows.
    """
    if state.prompts is not None and state.prompts.rows != spec.rows:
        raise CorruptStoreError(
            f"spec.json has {spec.rows} rows, the journal committed {state.prompts.rows}", hint="run embstore verify STORE"
        )
    grid = grid_of(spec)
    for record in state.windows.values():
        if misfit(grid, record):
            raise CorruptStoreError(
                f"journal.jsonl: window {record.window} does not fit the grid of spec.json",
                hint="run embstore verify STORE --repair, then embstore build --resume",
            )


def plan(spec: StoreSpec, state: JournalState) -> BuildPlan:
    """The windows without a commit."""
    grid = grid_of(spec)
    windows = tuple(window for window in range(grid.num_windows) if window not in state.windows)
    return BuildPlan(grid=grid, windows=windows)


def refuse_other_input(
    spec: StoreSpec, config: EmbeddingConfig, model: ModelIdentity | None, hardware: Mapping[str, object] | None
) -> list[str]:
    """Compare everything that was given with what the store pinned.

    Parameters
    ----------
    spec
        The stored spec.
    config
        Options of this run; None means "as stored" and never differs.
    model
        Identity of the model given or found, None when none is needed.
    hardware
        Device, capability, packing and threads of this run, None when no row will be computed.

    Returns
    -------
    list of str
        Hardware fields that differ (only drift can excuse those).

    Raises
    ------
    IdentityMismatchError
        Any other field differs; all of them are named with both values.
    """
    stored = spec.embedding
    explicit: dict[str, tuple[object, object]] = {
        "max_tokens": (stored.max_tokens, config.max_tokens),
        "vocab": (stored.columns, config.vocab),
        "space": (stored.space, config.space),
        "pooling": (stored.pooling, config.pooling),
        "batch_tokens": (stored.batch_tokens, config.batch_tokens),
        "dtype": (stored.dtype, None if config.dtype == "auto" else config.dtype),
        "window_rows": (spec.window_rows, config.window_rows),
        "chunk_rows": (spec.chunk_rows, config.chunk_rows),
        "compressor": (spec.compressor, config.compressor),
        "trust_remote_code": (spec.model.trust_remote_code, config.trust_remote_code),
    }
    mismatches = [
        FieldMismatch(field=name, stored=left, given=right)
        for name, (left, right) in explicit.items()
        if right is not None and left != right
    ]
    if model is not None:
        mismatches += model_mismatches(spec.model, model)
    if mismatches:
        raise IdentityMismatchError(mismatches)
    return [name for name, value in (hardware or {}).items() if getattr(stored, name) != value]


def model_mismatches(stored: ModelIdentity, given: ModelIdentity) -> list[FieldMismatch]:
    """Fields that make another model of it: all but the name (a renamed or moved folder) and the trust in its code.

    Stores from before December 2026 have no digest of that code, so it is not compared.
    """
    ignored = ["model.name", "model.trust_remote_code", *([] if stored.code_sha256 else ["model.code_sha256"])]
    return [each for each in diff_fields(stored, given, prefix="model.") if each.field not in ignored]


def as_stored(hardware: Mapping[str, object], stored: EmbeddingSpec) -> dict[str, object]:
    """Hardware of this run, which packs nothing that the store was made without."""
    packed = {name: bool(hardware.get(name)) and bool(getattr(stored, name)) for name in ("packed_layers", "packed_head")}
    return {**hardware, **packed}


def refuse_drift(spec: StoreSpec, fields: list[str], hardware: Mapping[str, object]) -> None:
    """Refuse other hardware or thread counts, which change low bits of rows."""
    mismatches = [FieldMismatch(field=name, stored=getattr(spec.embedding, name), given=hardware[name]) for name in fields]
    raise IdentityMismatchError(
        mismatches,
        hint="resume on the same hardware and threads, or add --allow-drift (recorded; rows then differ in low bits)",
    )
