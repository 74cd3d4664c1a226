"""A dry run: what a build would do and cost, decided by what the build itself decides by, with nothing left behind.

There is no store: prompts are read once and forgotten, except for a sample that the model is probed with. The one thing that
may take space is the index of prompts, in a file without a name, where it does not fit the memory budget.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from embstore.core.config import DEFAULT_CHAT_DATE, BuildConfig, PromptRule
from embstore.core.errors import ConfigError
from embstore.core.events import Observer, Preflight, ignore, stage
from embstore.core.interfaces import EmbedderSource
from embstore.core.prompts import Prompt, decode_row
from embstore.core.records import PromptsRecord
from embstore.flow.admission import choose_device, plan_new, plan_reusing, refuse_other_turns, settle_reused
from embstore.flow.first_checks import check_command, on_hub
from embstore.flow.pool_summary import judge_quarantined
from embstore.flow.reuse import RowMatcher, open_reused
from embstore.flow.run import RunContext, timed
from embstore.flow.template_check import try_template
from embstore.storage.ingest import refuse_unusable, tell_undecoded
from embstore.storage.key_index import batches
from embstore.storage.placing import Counts, Placing
from embstore.storage.prompt_source import PromptSource, open_source

SAMPLE_ROWS, _LEAST_ROWS = 1024, 32
_BUDGET_SHARE = 8  # of --memory-budget, for the sample


class _Sample:
    """A seeded sample of rows of a stream (reservoir sampling, Vitter's algorithm R), as a ``PromptReader``.

    Whoever reads single rows of the pool gets rows of the sample, which is one of the pool: the pool is gone. Where rows are
    so long that the sample outgrows ``max_bytes``, it becomes smaller: a random half of a sample is one, too.
    """

    def __init__(self, max_bytes: int, seed: int = 0) -> None:
        self.rows: list[tuple[int, bytes]] = []
        self._random = random.Random(seed)
        self._size, self._max_bytes = SAMPLE_ROWS, max_bytes
        self._seen = self._bytes = 0

    def offer(self, row: int, encoded: bytes) -> None:
        """The next row that the model would compute."""
        self._seen += 1
        if len(self.rows) < self._size:
            self.rows.append((row, encoded))
        elif (at := self._random.randrange(self._seen)) < self._size:
            self._bytes -= len(self.rows[at][1])
            self.rows[at] = row, encoded
        else:
            return
        self._bytes += len(encoded)
        while self._bytes > self._max_bytes and self._size > _LEAST_ROWS:
            self._size //= 2
            self._random.shuffle(self.rows)
            del self.rows[self._size :]
            self._bytes = sum(len(kept) for _, kept in self.rows)

    def __len__(self) -> int:
        return self._seen

    def sample(self, rows: Sequence[int]) -> list[Prompt]:
        """As many prompts of the sample as there are ``rows``."""
        return [decode_row(encoded) for _, encoded in self.rows[: len(rows)]]

    def prompts(self) -> list[tuple[int, Prompt]]:
        """Row and prompt of the whole sample, in row order."""
        return [(row, decode_row(encoded)) for row, encoded in sorted(self.rows)]


def preflight(
    prompts: str | Path | None,
    *,
    out: str | Path,
    config: BuildConfig,
    scratch: str | Path | None = None,
    observer: Observer = ignore,
    source: EmbedderSource | None = None,
) -> Preflight:
    """The plan and cost of ``build`` (``--dry-run``); observers get the same figures. Writes nothing to ``out``.

    Parameters
    ----------
    prompts, out, config, observer, source
        As for ``build``.
    scratch
        Folder for an index of prompts that does not fit the memory budget. None: where temporary files go.

    Raises
    ------
    EmbstoreError
        The build would be refused, or stop at chats like those of the sample.
    """
    root, config, seconds = Path(out), config.for_workers, dict[str, float]()
    observer = timed(observer, seconds)
    folder = Path(scratch if scratch is not None else tempfile.gettempdir())
    if prompts is None:
        raise ConfigError("a dry run needs the prompts file", hint="give PROMPTS, the file to build from")
    if not folder.is_dir():
        raise ConfigError(f"the scratch folder {folder} does not exist", hint="create it, or give another --scratch")
    given = on_hub(prompts, config.dataset)
    source = check_command(root, given, config, source=source, resume=True, observer=observer)
    with contextlib.ExitStack() as resources:
        context = RunContext(config=config, source=source, observer=observer, seconds=seconds, resources=resources)
        context.compute_exactly(needs_torch=False)
        return _planned(context, given if given is not None else prompts, root, folder)


def _planned(context: RunContext, prompts: PromptSource, root: Path, scratch: Path) -> Preflight:
    config, observer, source = context.config, context.observer, context.source
    stores = open_reused(config.reuse, root)
    matcher = None
    if stores:
        memory_bytes = config.memory_budget_bytes
        matcher = RowMatcher(stores, folder=scratch, memory_bytes=memory_bytes, observer=observer)
    record, sample = _read(context, prompts, matcher, scratch)
    if matcher is None:
        if source is None:
            raise ConfigError("no model was given", hint="add --model")
        choose_device(context, None, computes=True)
        _try_template(context, sample, record.rows, config.embedding.chat_date or DEFAULT_CHAT_DATE)
        return plan_new(context, source, sample, record, root=root, work=None).preflight
    refuse_other_turns(record, stores)
    reuse = matcher.reuse()
    settled = settle_reused(context, record, reuse, (prompt for _, prompt in sample.prompts()))
    _try_template(context, sample, record.rows, settled.old.embedding.chat_date)
    return plan_reusing(context, record, sample, reuse, settled, root=root).preflight


def _read(
    context: RunContext, prompts: PromptSource, matcher: RowMatcher | None, scratch: Path
) -> tuple[PromptsRecord, _Sample]:
    """Read all prompts: what became of the lines, and a sample of the rows that are not copied."""
    config, observer = context.config, context.observer
    sample = _Sample(config.memory_budget_bytes // _BUDGET_SHARE)
    rule = PromptRule(turns=config.turns or "all")
    with (
        stage(observer, "prompts", unit="lines") as advance,
        open_source(prompts, config.fields, rule, config.dataset, scratch=scratch, observer=observer) as opened,
    ):
        placing = Placing(
            prompts,
            opened,
            limit=config.limit,
            folder=scratch,
            memory_bytes=config.memory_budget_bytes,
            observer=observer,
            advance=advance,
        )
        for batch in batches((line for line in placing if line.is_new), lambda line: len(line.encoded)):
            copied = [False] * len(batch)
            if matcher is not None:
                copied = matcher.match([decode_row(line.encoded) for line in batch]).tolist()
            for line, is_copied in zip(batch, copied, strict=True):
                if not is_copied:
                    sample.offer(line.row, line.encoded)
    refuse_unusable(placing.counts, prompts, config.fields, strict=config.strict)
    tell_undecoded(placing.counts, prompts, observer)
    record = placing.counts.record(rule)
    judge_quarantined(context, record, lists=_named(placing.counts))
    return record, sample


def _named(counts: Counts) -> str:
    """The first quarantined lines: there will be no file that lists them."""
    first = [f"{where}: {reason}" for where, reason in counts.first_quarantined]
    more = counts.quarantined - len(first)
    return "; ".join(first) + (f"; and {more:,} more, which a build lists" if more else "")


def _try_template(context: RunContext, sample: _Sample, num_rows: int, chat_date: str | None) -> None:
    prompts = sample.prompts()
    if context.source is None or all(prompt.messages is None for _, prompt in prompts):
        return
    with stage(context.observer, "templates", len(prompts), "prompts"):
        template = context.source.template(chat_date)
        if template is not None:
            try_template(context, template, prompts, num_rows)
