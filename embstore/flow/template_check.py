"""The stage between stage 0 and the model: every chat is rendered once, so that all that the template refuses are known.

A chat that the template refuses has no tokens and so no row. It is found here, and not hours later in its window. Rows do
not depend on this stage: the pass renders each chat again, and states the same reason. Small pools are rendered in this
process, large ones also in others; memory is bounded by a few blocks of rows for each of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import queue
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import RowError
from embstore.core.events import Notice, stage
from embstore.core.format import PROMPTS, QUARANTINE, REFUSED, canonical_json
from embstore.core.interfaces import ChatTemplate, EmbedderSource
from embstore.core.prompts import Prompt, decode_row
from embstore.core.records import REFUSED_BY_TEMPLATE, FailedRow, TemplateRecord
from embstore.core.rows import RowRange
from embstore.flow.pool_summary import judge_quarantined
from embstore.flow.reuse import Reuse
from embstore.flow.run import Run, RunContext
from embstore.flow.template_worker import TemplateWorker, WorkerLostError
from embstore.storage.atomic import DurableFile
from embstore.storage.prompt_table import PromptTable

_BLOCK_ROWS = 1024
_WORTH_SECONDS = 20.0  # of rendering that is left: below, starting processes takes longer than they save
_SHOWN = 3
_MOST_PROCESSES, _PROCESS_BYTES = 16, 512 << 20  # each has Python, transformers and a tokenizer in memory
_OR_KEEP = "or add --on-error quarantine to keep their rows without vectors"
_CHAT = b'"messages": ['  # in every canonical line of a chat, and hardly in another


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Rows to look at: ``offsets`` int64 [n + 1] of their lines in ``prompts.jsonl``; those in ``skipped`` are copied."""

    first_row: int
    offsets: NDArray[np.int64]
    skipped: frozenset[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """What came of a block: how many chats it has, and row, id and reason of those that were refused."""

    chats: int
    refused: list[tuple[int, str | None, str]]


def render_block(path: Path, block: Block, template: ChatTemplate) -> Rendered:
    """Render the chats of a block, one at a time."""
    chats, refused = 0, []
    num_rows = len(block.offsets) - 1
    table = PromptTable(path, num_rows, offsets=block.offsets)
    for row, line in enumerate(table.lines(RowRange(0, num_rows)), block.first_row):
        if row in block.skipped or _CHAT not in line:
            continue
        prompt = decode_row(line)
        if prompt.messages is None:
            continue
        chats += 1
        if (reason := template.refusal(prompt)) is not None:
            refused.append((row, prompt.id, reason))
    return Rendered(chats=chats, refused=refused)


def check_templates(run: Run, source: EmbedderSource, prompts: PromptTable, reuse: Reuse, chat_date: str | None) -> None:
    """Find every chat that the template refuses, of those that the model is to compute, unless the journal knows them.

    Raises
    ------
    RowError
        There are such chats, and failed rows are not quarantined.
    """
    writer = run.writer
    record = writer.state.template
    if record is None or writer.state.spec is None:  # a spec pins the template
        blocks = _blocks(prompts, reuse)
        first = next((block for block in blocks if _has_chats(prompts, block)), None)
        template = source.template(chat_date) if first is not None else None
        if first is None or template is None:
            if record is not None and record.refused:  # by another template, or chats that are copied now
                (writer.root / REFUSED).unlink(missing_ok=True)
                nobody = hashlib.sha256().hexdigest()  # no template has this digest
                writer.commit(TemplateRecord(asked=nobody, chats=0, refused=0, first=[]))
            return
        asked = [template.digest, *(store.digest for store in reuse.record.stores)]
        digest = hashlib.sha256(canonical_json(asked).encode()).hexdigest()
        if record is None or record.asked != digest:
            record = _rendered(run, template, itertools.chain([first], blocks), digest)
            writer.commit(record)
    _say(run, record)


def _rendered(run: Run, template: ChatTemplate, blocks: Iterator[Block], asked: str) -> TemplateRecord:
    """What the template says of all chats; those that it refuses are listed in a file."""
    root, num_rows = run.writer.root, _num_rows(run)
    chats, shown, num_refused = 0, list[FailedRow](), 0
    (root / REFUSED).unlink(missing_ok=True)  # of another template
    with contextlib.ExitStack() as closing:
        advance = closing.enter_context(stage(run.observer, "templates", num_rows, "prompts"))
        each = closing.enter_context(
            contextlib.closing(_each(root / PROMPTS, template, blocks, num_rows, _num_processes(run)))
        )
        listed = None
        for seen_rows, rendered in each:
            chats += rendered.chats
            num_refused += len(rendered.refused)
            for row, prompt_id, reason in rendered.refused:
                listed = listed or closing.enter_context(DurableFile(root / REFUSED))
                line = json.dumps({"row": row, "id": prompt_id, "reason": reason}, ensure_ascii=False)
                listed.write(line.encode() + b"\n")
                if len(shown) < _SHOWN:
                    shown.append(FailedRow(row=row, reason=reason))
            advance(seen_rows)
    return TemplateRecord(asked=asked, chats=chats, refused=num_refused, first=shown)


def _num_rows(run: Run) -> int:
    prompts = run.writer.state.prompts
    if prompts is None:
        raise AssertionError("chats are rendered after stage 0")
    return prompts.rows


def _blocks(prompts: PromptTable, reuse: Reuse) -> Iterator[Block]:
    for rows in RowRange(0, len(prompts)).split(_BLOCK_ROWS):
        missing = set(reuse.missing(rows).tolist())
        if missing:
            yield Block(
                first_row=rows.start,
                offsets=np.asarray(prompts.offsets[rows.start : rows.stop + 1]),
                skipped=frozenset(range(rows.start, rows.stop)) - missing,
            )


def _has_chats(prompts: PromptTable, block: Block) -> bool:
    rows = RowRange(block.first_row, block.first_row + len(block.offsets) - 1)
    return any(_CHAT in line for line in prompts.lines(rows))


def _each(
    path: Path, template: ChatTemplate, blocks: Iterator[Block], num_rows: int, num_processes: int
) -> Generator[tuple[int, Rendered], None, None]:
    """Rows and result of each block, in their order: here, and in other processes once that is worth while."""
    started, chats = time.perf_counter(), 0
    for block in blocks:
        rendered = render_block(path, block, template)
        seen_rows = len(block.offsets) - 1
        yield seen_rows, rendered
        chats += rendered.chats
        # as if all that is left were chats
        left_seconds = (time.perf_counter() - started) / max(1, chats) * (num_rows - block.first_row - seen_rows)
        if num_processes > 1 and left_seconds > _WORTH_SECONDS:
            yield from _in_processes(path, template, blocks, num_processes)
            return


def _num_processes(run: Run) -> int:
    """How many processes render: one for each core, within the memory budget."""
    from embstore.host.threads import num_cores  # noqa: PLC0415 - imports torch, which a source with a template has loaded

    cores = run.config.embedding.threads or num_cores()
    return max(1, min(cores, _MOST_PROCESSES, run.config.memory_budget_bytes // _PROCESS_BYTES))


def _in_processes(
    path: Path, template: ChatTemplate, blocks: Iterator[Block], num_processes: int
) -> Iterator[tuple[int, Rendered]]:
    """Blocks by worker processes, in order; a few are under way for each. What a worker fails at is rendered here."""
    idle: queue.SimpleQueue[TemplateWorker] = queue.SimpleQueue()
    workers = [TemplateWorker(template, path) for _ in range(num_processes)]
    for worker in workers:
        idle.put(worker)

    def render(block: Block) -> Rendered | None:
        worker = idle.get()
        try:
            return worker.render(block)
        except WorkerLostError:
            return None
        finally:
            idle.put(worker)

    waiting: list[tuple[Block, Future[Rendered | None]]] = []
    with contextlib.ExitStack() as closing:
        for worker in workers:
            closing.callback(worker.stop)  # if a thread had just begun to start it
        threads = closing.enter_context(ThreadPoolExecutor(num_processes, thread_name_prefix="embstore-render"))
        for worker in workers:
            closing.callback(worker.stop)  # before the threads are waited for: they wait for the workers
        for block in blocks:
            waiting.append((block, threads.submit(render, block)))
            if len(waiting) > 2 * num_processes:
                yield _result(path, template, *waiting.pop(0))
        while waiting:
            yield _result(path, template, *waiting.pop(0))


def _result(path: Path, template: ChatTemplate, block: Block, rendered: Future[Rendered | None]) -> tuple[int, Rendered]:
    """What came of a block."""
    return len(block.offsets) - 1, rendered.result() or render_block(path, block, template)


def try_template(context: RunContext, template: ChatTemplate, prompts: Sequence[tuple[int, Prompt]], num_rows: int) -> None:
    """Render some chats of a pool of ``num_rows``, given with their rows, for a dry run.

    Raises
    ------
    RowError
        The template refuses one, and failed rows are not quarantined.
    """
    chats = [(row, prompt) for row, prompt in prompts if prompt.messages is not None]
    refused = [(row, prompt, reason) for row, prompt in chats if (reason := template.refusal(prompt)) is not None]
    if not refused:
        return
    first = [_refusal(prompt.id or prompt.derived_id, row, reason) for row, prompt, reason in refused[:_SHOWN]]
    of = f"{len(chats):,} chats" + (" that were tried" if len(prompts) < num_rows else "")
    text, wrong = _refusals(first, len(refused), of), _wrong(len(refused), len(chats))
    if context.config.on_error == "quarantine":
        context.observer(Notice(message=f"{text}; they keep their row numbers without vectors"))
        return
    raise RowError(text, hint=f"correct {wrong} and run the command again, {_OR_KEEP}")


def _say(run: Run, record: TemplateRecord) -> None:
    """Stop at refused chats that are still to come, or say that they keep their numbers."""
    state = run.writer.state
    settled = sum(failed.reason.startswith(REFUSED_BY_TEMPLATE) for failed in state.failed)
    if record.refused <= settled:
        return
    root = run.writer.root
    first = [_refusal(run.prompts.sample([failed.row])[0].id, failed.row, failed.reason) for failed in record.first]
    refused = _refusals(first, record.refused, f"{record.chats:,} chats")
    if run.config.on_error == "quarantine":
        run.observer(Notice(message=f"{refused}; they keep their row numbers without vectors"))
        if state.prompts is not None:
            judge_quarantined(
                run,
                state.prompts,
                lists=f"{root}/{QUARANTINE} and {root}/{REFUSED} list them",
                refused=record.refused - settled,
                has_rows=not run.writer.may_begin_again,
            )
        return
    wrong = _wrong(record.refused, record.chats)
    if run.writer.may_begin_again:
        way = f"correct {wrong} and run the command again"
    else:
        way = f"correct {wrong} and build into another --out with --reuse {root}"
    raise RowError(refused, hint=f"{root}/{REFUSED} lists them; {way}, {_OR_KEEP}")


def _refusal(prompt_id: str | None, row: int, reason: str) -> str:
    return f"{prompt_id!r} (row {row}): {reason.removeprefix(f'{REFUSED_BY_TEMPLATE}: ')}"


def _refusals(first: Sequence[str], count: int, of: str) -> str:
    more = f"; and {count - len(first):,} more" if count > len(first) else ""
    return f"the chat template refuses {count:,} of {of}: {'; '.join(first)}{more}"


def _wrong(refused: int, chats: int) -> str:
    return "the prompts" if refused < chats else "the prompts, or the chat template of the model,"
