"""Stage 0 of a run: commit the canonical rows, or compare the given prompts with those that are committed.

A store without a committed row is begun again by other prompts; one that has rows refuses them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from embstore.core.config import BuildConfig, PromptRule
from embstore.core.errors import (
    ArrayError,
    BudgetError,
    ConfigError,
    CorruptStoreError,
    FieldMismatch,
    IdentityMismatchError,
    ModelError,
    PromptError,
)
from embstore.core.events import Notice, stage
from embstore.core.format import LINE_ROWS, MANIFEST, PROMPTS, QUARANTINE, WORK
from embstore.core.prompts import decode_row
from embstore.core.records import OriginRecord, PromptsRecord
from embstore.flow.first_checks import models_of_runs
from embstore.flow.run import Run
from embstore.storage.atomic import make_directory, remove_folder
from embstore.storage.hub_dataset import HubDataset
from embstore.storage.ingest import ingest
from embstore.storage.prompt_source import PromptSource
from embstore.storage.prompt_table import PromptTable
from embstore.storage.reader import open_published
from embstore.storage.verify import check_stage0

_GIVEN = "given"  # in work: stage 0 of the prompts file, to be compared with what was begun
_OF_LINES = (LINE_ROWS, QUARANTINE)  # the files of stage 0 that depend on more than the rows

_SHOWN_BEFORE, _SHOWN_CHARACTERS = 20, 60  # of two lines that differ

_REFUSALS = (ArrayError, BudgetError, ConfigError, IdentityMismatchError, ModelError, PromptError)


@contextlib.contextmanager
def nothing_left_if_refused(run: Run) -> Iterator[None]:
    """Where an input is refused, delete the store that this run began, unless it has a spec already."""
    try:
        yield
    except _REFUSALS:
        run.writer.discard()
        raise


def commit_prompts(run: Run, source: PromptSource | None, *, resume: bool) -> PromptsRecord:
    """Commit the canonical rows; on a resume, check that the given file still contains the same rows.

    A store without a committed row has those of the given file afterwards, whatever it had before.
    """
    writer, config = run.writer, run.config
    _refuse_lost_journal(run)
    if writer.state.prompts is not None and not resume:
        begin_again(run, "--resume was not given")
    committed = writer.state.prompts
    if source is not None and (committed is None or writer.may_begin_again):
        record = _commit_given(run, source)
    elif committed is None:
        raise ConfigError(
            f"no prompts file was given, and {writer.root} has no prompts yet",
            hint="give PROMPTS, the file to build from",
        )
    else:
        record = committed
        _refuse_other_rule(committed, config)
        _refuse_other_origin(writer.state.origin, source)
        if not config.trust_journal or source is not None:
            size = None if config.trust_journal else sum(digest.bytes for digest in record.files.values())
            with stage(run.observer, "check", size, "bytes") as advance:
                if not config.trust_journal:
                    files = dict(record.files)
                    digest = files.pop(PROMPTS, None)  # compared by the table, which reads the file anyway
                    check_stage0(writer.root, files, advance)
                    run.read_prompts = PromptTable(writer.root / PROMPTS, record.rows, digest, seen=advance)
                if source is not None:
                    _refuse_other_prompts(run, record, source)
    return record


def _refuse_other_rule(committed: PromptsRecord, config: BuildConfig) -> None:
    """A store keeps the rule by which its lines became prompts."""
    stored = committed.rule.turns
    if config.turns not in (None, stored):
        raise IdentityMismatchError([FieldMismatch(field="turns", stored=stored, given=config.turns)])


def _commit_given(run: Run, source: PromptSource) -> PromptsRecord:
    """The prompts of ``source`` as those of a store without committed rows. They are read once: they may come by a pipe."""
    writer, config, committed = run.writer, run.config, run.writer.state.prompts
    if committed is None and writer.state.origin is not None:
        writer.begin_again()  # killed between the two lines; other prompts may not come from there
    folder = writer.root if committed is None else writer.work / _GIVEN
    make_directory(folder)
    given = ingest(
        source,
        folder,
        writer.work,
        strict=config.strict,
        limit=config.limit,
        fields=config.fields,
        rule=PromptRule(turns=config.turns or (committed.rule.turns if committed is not None else "all")),
        choice=config.dataset,
        memory_bytes=config.memory_budget_bytes,
        observer=run.observer,
    )
    origin = source.origin if isinstance(source, HubDataset) else None
    if committed is None:
        if origin is not None:
            writer.commit(origin)
        writer.commit(given)
        return given
    problem = _stage0_problem(writer.root, committed)
    # not the fingerprint alone: lines without a prompt, and repeats, have no rows, and may have been corrected
    if problem is None and (given, origin) == (committed, writer.state.origin):
        remove_folder(folder, missing_ok=True)
        return committed
    begin_again(run, problem or "the prompts differ")
    writer.adopt_prompts(folder, given, origin)
    return given


def _stage0_problem(root: Path, record: PromptsRecord) -> str | None:
    try:
        check_stage0(root, record.files)
    except CorruptStoreError as error:
        return str(error)
    return None


def begin_again(run: Run, why: str, *, keeps_prompts: bool = False) -> None:
    """Take back what a store without a committed row has, or all but its prompts, and say why."""
    run.observer(Notice(message=f"{run.writer.root} has no committed rows yet, so it is begun again: {why}"))
    run.writer.begin_again(keeps_prompts=keeps_prompts)
    run.read_prompts = None


def _refuse_other_origin(stored: OriginRecord | None, source: PromptSource | None) -> None:
    """Another commit of the dataset is refused by its name, before it is read."""
    if stored is None or not isinstance(source, HubDataset):
        return
    given = dataclasses.asdict(source.origin)
    mismatches = [
        FieldMismatch(field=f"dataset.{name}", stored=value, given=given[name])
        for name, value in dataclasses.asdict(stored).items()
        if value != given[name] and None not in (value, given[name])  # the only split need not be named
    ]
    if not mismatches:
        return
    raise IdentityMismatchError(
        mismatches,
        hint=f"resume without PROMPTS, or with {stored.dataset}@{stored.revision}; or build into another --out",
    )


def _refuse_lost_journal(run: Run) -> None:
    """Refuse a manifest without a complete journal: rows that readers use must not be computed again under it."""
    finished = open_published(run.writer.root)
    committed = run.writer.state.committed_rows
    if finished is not None and committed != finished.num_rows:
        raise CorruptStoreError(
            f"{MANIFEST} publishes {finished.num_rows} rows, but the journal commits {committed}: its end is missing",
            hint="restore journal.jsonl from a copy of the store, or run embstore verify STORE --repair and then "
            "embstore build PROMPTS --resume to compute the missing rows again; readers can use the store until then",
        )


def _refuse_other_prompts(run: Run, record: PromptsRecord, source: PromptSource) -> None:
    """Ingest the given file in a scratch folder and compare; the error names the first row that differs."""
    root, config = run.writer.root, run.config
    had_work = (root / WORK).is_dir()
    folder = run.writer.work / _GIVEN
    make_directory(folder)
    try:
        given = ingest(
            source,
            folder,
            folder,
            strict=config.strict,
            limit=config.limit,
            fields=config.fields,
            rule=record.rule,
            choice=config.dataset,
            memory_bytes=config.memory_budget_bytes,
        )
        if given.fingerprint == record.fingerprint:
            if any(given.files[name] != record.files.get(name) for name in _OF_LINES):
                run.observer(
                    Notice(message=f"{source} has the rows of {root} on other lines: the store keeps its own line numbers")
                )
            return
        mismatches = [FieldMismatch(field="prompts", stored=record.fingerprint[:16], given=given.fingerprint[:16])]
        if given.rows != record.rows:
            mismatches.append(FieldMismatch(field="rows", stored=record.rows, given=given.rows))
        with (root / PROMPTS).open("rb") as stored_file, (folder / PROMPTS).open("rb") as given_file:
            for row, (left, right) in enumerate(zip(stored_file, given_file, strict=False)):
                if left != right:
                    stored_text, given_text = _where_they_differ(left, right)
                    mismatches.append(FieldMismatch(field=f"row {row}", stored=stored_text, given=given_text))
                    break
    finally:
        # a resume that is refused changes nothing; what cannot be deleted is scratch, which the next writer deletes
        remove_folder(folder if had_work else run.writer.work, missing_ok=True)
    raise IdentityMismatchError(mismatches, hint=_with_other_prompts(run, source))


def _where_they_differ(left: bytes, right: bytes) -> tuple[str, str]:
    """Two canonical lines from shortly before the first difference: that of their prompts, if these are not the same."""
    stored, given = decode_row(left).rendered, decode_row(right).rendered
    if stored == given:
        stored, given = left.decode(), right.decode()
    start = max(0, len(os.path.commonprefix([stored, given])) - _SHOWN_BEFORE)  # noqa: RUF071 - of any two strings
    cut, before = slice(start, start + _SHOWN_CHARACTERS), "..." if start else ""
    return before + stored[cut].rstrip(), before + given[cut].rstrip()


def _with_other_prompts(run: Run, source: PromptSource) -> str:
    """The next command for a pool that has changed: a new store, with the rows that this one has."""
    root = run.writer.root
    if isinstance(source, HubDataset):
        source = f"{source.origin.dataset}@{source.origin.revision}"
    if not isinstance(source, str | Path):
        return "use the ids of the store, or import into another --out"
    model = run.config.embedding.model or next(iter(reversed(models_of_runs(root, run.writer.state))), ("MODEL", None))[0]
    name = "PROMPTS" if str(source).startswith(("/dev/fd/", "/proc/")) else str(source)  # <(...) has another one next time
    command = ["embstore", "build", name, "--model", model, "--out", f"{root}-new", "--resume", "--reuse", str(root)]
    return f"to embed only the prompts that are new: {shlex.join(command)}"
