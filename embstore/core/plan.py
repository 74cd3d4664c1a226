"""Which windows are left, and whether a resume is about the same store. Pure: values in, values or a refusal out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
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
) -> list[FieldMismatch]:
    """Compare everything that was given with what the store pinned.

    An option is compared as it was resolved: the line that began a build continues it.

    Parameters
    ----------
    spec
        The stored spec.
    config
        Options of this run; None means "as stored" and never differs.
    model
        Identity of the model given or found, None when none is needed.
    hardware
        Device, capability, packing, threads and versions of this run, None when no row will be computed.

    Returns
    -------
    list of FieldMismatch
        Hardware and versions that differ (only drift can excuse those).

    Raises
    ------
    IdentityMismatchError
        Any other field differs; all of them are named with both values.
    """
    stored = spec.embedding
    explicit: dict[str, tuple[object, object]] = {
        "max_tokens": (stored.max_tokens, _resolved_max_tokens(stored, config.max_tokens)),
        "vocab": (stored.columns, config.vocab),
        "space": (stored.space, config.space),
        "pooling": (stored.pooling, config.pooling),
        "batch_tokens": (stored.batch_tokens, config.batch_tokens),
        "chat_date": (stored.chat_date or "none recorded", config.chat_date),
        "dtype": (stored.dtype, None if config.dtype == "auto" else config.dtype),
        "window_rows": (spec.window_rows, config.window_rows),
        "chunk_rows": (spec.chunk_rows, config.chunk_rows),
        "compressor": (spec.compressor, config.compressor),
        "trust_remote_code": (spec.model.trust_remote_code, _trusted(config, model, computes=hardware is not None)),
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
    return hardware_mismatches(stored, hardware or {})


def _resolved_max_tokens(stored: EmbeddingSpec, asked: int | None) -> int | None:
    """What a new store would take: at most what the model can, where the spec says how much that is."""
    fits = asked is None or stored.token_limit is None or asked <= stored.token_limit
    return asked if fits or stored.max_tokens != stored.token_limit else stored.token_limit


def _trusted(config: EmbeddingConfig, model: ModelIdentity | None, *, computes: bool) -> bool | None:
    """Whether code that comes with the model runs; only a model of a format that has such code knows the option."""
    is_compared = computes or config.trust_remote_code is not None
    return model.trust_remote_code if model is not None and is_compared else config.trust_remote_code


def model_mismatches(stored: ModelIdentity, given: ModelIdentity) -> list[FieldMismatch]:
    """Fields that make another model of it: not the name (a renamed or moved folder) and the revision (the digests decide).

    The trust in its code is an option, which ``refuse_other_input`` compares. Stores from before December 2026 have no
    digest of that code, so it is not compared.
    """
    ignored = {"model.name", "model.revision", "model.trust_remote_code"}
    if not stored.code_sha256:
        ignored.add("model.code_sha256")
    return [each for each in diff_fields(stored, given, prefix="model.") if each.field not in ignored]


def hardware_mismatches(stored: EmbeddingSpec, hardware: Mapping[str, object]) -> list[FieldMismatch]:
    """What differs of hardware and versions; versions are named one by one, and not compared where none were recorded."""
    unlike: list[FieldMismatch] = []
    for name, given in hardware.items():
        kept = getattr(stored, name)
        if name == "versions" and (kept is None or given is None):
            continue
        if dataclasses.is_dataclass(kept):
            unlike += diff_fields(kept, given, prefix=f"{name}.")
        elif kept != given:
            unlike.append(FieldMismatch(field=name, stored=kept, given=given))
    return unlike


def settings_mismatches(stored: EmbeddingSpec, other: EmbeddingSpec) -> list[FieldMismatch]:
    """What differs between the settings of two stores; versions and dates are compared where both recorded them."""
    if stored.versions is None or other.versions is None:
        stored, other = (dataclasses.replace(each, versions=None) for each in (stored, other))
    if stored.chat_date is None or other.chat_date is None:
        stored, other = (dataclasses.replace(each, chat_date=None) for each in (stored, other))
    return diff_fields(stored, dataclasses.replace(other, token_limit=stored.token_limit), prefix="embedding.")


def as_stored(hardware: Mapping[str, object], stored: EmbeddingSpec) -> dict[str, object]:
    """Hardware of this run, which packs nothing that the store was made without, and records no versions if it did not."""
    packed = {name: bool(hardware.get(name)) and bool(getattr(stored, name)) for name in ("packed_layers", "packed_head")}
    versions = hardware.get("versions") if stored.versions is not None else None
    return {**hardware, **packed, "versions": versions}


def refuse_drift(drifted: Sequence[FieldMismatch]) -> None:
    """Refuse other hardware, thread counts or versions, which change low bits of rows."""
    raise IdentityMismatchError(drifted, hint=f"{_way_back(drifted)}, or add --allow-drift (recorded; {_DRIFTED})")


_DRIFTED = "rows then differ in low bits"
_VERSIONS = "versions."


def _way_back(drifted: Iterable[FieldMismatch]) -> str:
    """How to continue without drift: on the same hardware, with the same versions, or both."""
    names = [each.field for each in drifted]
    versions = [
        f"{each.field.removeprefix(_VERSIONS)} {each.stored}" for each in drifted if each.field.startswith(_VERSIONS)
    ]
    same = "resume on the same hardware and threads"
    if not versions:
        return same
    install = f"install {', '.join(versions)} and resume"
    return install if len(versions) == len(names) else f"{install} on the same hardware and threads"
