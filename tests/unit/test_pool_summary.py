"""What became of the lines: judged before the model runs, counted by reason, said again at the end."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from embstore.core.config import BuildConfig
from embstore.core.errors import ConfigError, IdentityMismatchError, PromptError, RowError
from embstore.core.events import Event, Notice
from embstore.core.reasons import MAX_KINDS, OTHER_KIND, by_kind, counted, reason_kind
from embstore.core.records import PromptsRecord, decode_journal, encode_journal_header, encode_journal_record
from embstore.flow.dry_run import preflight
from embstore.flow.pool_summary import _is_cut_alike
from embstore.storage.journal import read_journal
from embstore.views import info, terminal
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource
from tests.support.records import PROMPTS
from tests.support.stage0 import ingested
from tests.support.stores import build_part, build_small, journal_records, write_lines

pytestmark = pytest.mark.usefixtures("without_syncs")

QUARANTINE = dataclasses.replace(CONFIG, on_error="quarantine")


def pool(path: Path, *, good: int, bad: int) -> Path:
    broken: list[object] = [b"{broken\n", b"\n", b'{"prompt": ""}\n', b"[1]\n"]
    lines: list[object] = [{"prompt": f"Explain {row}"} for row in range(good)]
    return write_lines(path, [*lines, *(broken[index % len(broken)] for index in range(bad))])


def most(share: float, config: BuildConfig = CONFIG) -> BuildConfig:
    return dataclasses.replace(config, max_quarantined=share)


# --- kinds of reasons -------------------------------------------------------------------------------------------------


def test_reasons_are_counted_by_kind() -> None:
    reasons = ["not JSON (Expecting value: line 1)", "not JSON (Extra data: char 7)", "not UTF-8 (byte 0)"]
    reasons += ["message 3 is not an object", "message 14 is not an object"]
    assert counted(reasons) == {"not JSON": 2, "not UTF-8": 1, "message N is not an object": 2}
    assert by_kind(counted(reasons)) == "message N is not an object: 2, not JSON: 2, not UTF-8: 1"


@given(st.lists(st.text(max_size=60), max_size=40))
def test_counts_are_bounded_whatever_the_reasons_name(reasons: list[str]) -> None:
    counts = counted(reasons)
    assert sum(counts.values()) == len(reasons)
    assert len(counts) <= MAX_KINDS + 1
    assert all(0 < len(kind) <= 80 for kind in counts)


def test_kinds_beyond_the_first_few_are_counted_together() -> None:
    counts = counted(f"reason {'x' * number}" for number in range(100))
    assert len(counts) == MAX_KINDS + 1
    assert counts[OTHER_KIND] == 100 - MAX_KINDS
    assert reason_kind("(") == OTHER_KIND


@pytest.mark.parametrize(
    "word", ["x{}", "it's {}", '\'"{}"; (', "{}" + "y" * 5000, "\\{}'...", "{}\n\x1b[2J", "a '{}' b", "{}..."]
)
def test_words_of_the_input_are_no_kinds_and_no_long_reasons(word: str, tmp_path: Path) -> None:
    """Kinds of parts, names of fields and keys, roles: each line may have its own, of any length."""
    words = [word.format(number * "z") for number in range(40)]
    user, lines = {"role": "user", "content": "a"}, [{"prompt": "good"}]
    for each in words:
        lines += [
            {"messages": [user, {"role": each, "content": [{"type": each}]}]},
            {"messages": [{"role": "user", "content": [{"type": each, "text": 1}]}]},
            {"messages": [{"role": "user", "content": [{each: 1}]}]},
            {"messages": [{each: 1}]},
            {each: 1},
            f"{{{json.dumps(each)}: 1, {json.dumps(each)}: 2}}\n".encode(),
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        ]
    out = tmp_path / "out"
    found = ingested(write_lines(tmp_path / "p.jsonl", lines), out)
    assert len(found.record.reasons) == 5
    assert {
        "message N has a part of kind ...": 3 * 40, "message N has no text role": 40, "no prompt": 40,
        "message N has a part of kind image_url": 40,
    }.items() <= found.record.reasons.items()  # fmt: skip
    (key,) = (kind for kind in found.record.reasons if kind.startswith("the key ..."))
    assert found.record.reasons[key] == 40
    assert max(len(reason) for _, reason in found.quarantine) <= 703


def test_counts_are_durable_and_old_journals_have_none(tmp_path: Path) -> None:
    build_small(pool(tmp_path / "p.jsonl", good=60, bad=6), tmp_path / "store")
    (record,) = [each for each in journal_records(tmp_path / "store") if isinstance(each, PromptsRecord)]
    assert record.reasons == {"not JSON": 2, "empty line": 2, "the prompt is empty": 1, "not a JSON object but list": 1}
    assert sum(record.reasons.values()) == record.quarantined
    line = encode_journal_record(1, PROMPTS)
    body = json.loads(line.rpartition(b"\t")[0])
    del body["reasons"]
    old = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    journal = encode_journal_header() + old + b"\t%08x\n" % zlib.crc32(old)
    assert decode_journal(journal, name="journal.jsonl")[0] == [PROMPTS]


# --- too many -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "share", "is_refused"),
    [
        (80, 20, 0.1, True),
        (90, 10, 0.1, False),
        (90, 10, 0.05, True),
        (50, 50, 0.5, False),
        (99, 1, 0.0, True),
        (99, 0, 0.0, False),
    ],
)
def test_more_than_the_chosen_share_is_refused_before_the_model(
    good: int, bad: int, share: float, is_refused: bool, tmp_path: Path
) -> None:
    prompts, store, source = pool(tmp_path / "p.jsonl", good=good, bad=bad), tmp_path / "store", FakeSource()
    if not is_refused:
        build_small(prompts, store, config=most(share), source=source)
        return
    with pytest.raises(
        PromptError, match=rf"{bad} of 100 lines \({bad}\.0%\) contain no usable prompt .*not JSON"
    ) as caught:
        build_small(prompts, store, config=most(share), source=source)
    assert source.creations == 0
    assert f"more than --max-quarantined {share:g}" in str(caught.value)
    assert "--text-field" in str(caught.value.hint)
    # the list that the message names is there, and the same command with another share goes on
    assert len((store / "quarantine.jsonl").read_text().splitlines()) == bad
    assert str(store / "quarantine.jsonl") in str(caught.value.hint)
    with pytest.raises(PromptError) as caught:
        preflight(prompts, out=tmp_path / "dry", config=most(share), source=source)
    assert "embstore-dry-run" not in f"{caught.value} {caught.value.hint}", "its folder is gone"
    build_small(prompts, store, config=most(1.0), resume=False)


def test_lines_that_were_corrected_or_deleted_count_no_more(tmp_path: Path) -> None:
    """The rows are the same then, and so is their fingerprint."""
    store = tmp_path / "store"
    with pytest.raises(PromptError):
        build_small(pool(tmp_path / "p.jsonl", good=60, bad=40), store)
    report = build_small(pool(tmp_path / "corrected.jsonl", good=60, bad=0), store, resume=True)
    assert (report.pool.lines, report.pool.quarantined) == (60, 0)
    assert np.load(store / "line_rows.npy").tolist() == list(range(60))
    # a store with rows keeps its lines, and says so
    events: list[Event] = []
    build_small(pool(tmp_path / "again.jsonl", good=60, bad=5), store, resume=True, observer=events.append)
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert [notice for notice in notices if "on other lines" in notice]


def test_refused_chats_count_as_well(tmp_path: Path) -> None:
    lines: list[object] = [{"prompt": f"Explain {row}"} for row in range(85)]
    lines += [{"messages": [{"role": "user", "content": f"REFUSE {row}"}]} for row in range(8)]
    prompts = write_lines(tmp_path / "p.jsonl", [*lines, *[b"broken\n"] * 7])
    source = FakeSource()
    source.has_template = True
    with pytest.raises(RowError, match=r"15 of 100 lines .*the chat template refuses it: 8, not JSON: 7"):
        build_small(prompts, tmp_path / "store", config=QUARANTINE, source=source)
    assert source.creations == 0
    report = build_small(prompts, tmp_path / "store", config=most(0.2, QUARANTINE), source=source)
    assert report.pool.quarantined_by == {"not JSON": 7}
    assert report.pool.failed_by == {"the chat template refuses it": 8}


@pytest.mark.parametrize(("bad", "is_warning"), [(1, False), (2, True)])
def test_more_than_one_in_a_hundred_is_a_warning(bad: int, is_warning: bool, tmp_path: Path) -> None:
    events: list[Event] = []
    build_small(pool(tmp_path / "p.jsonl", good=100 - bad, bad=bad), tmp_path / "store", observer=events.append)
    (notice,) = [event for event in events if isinstance(event, Notice) and "no usable prompt" in event.message]
    assert notice.is_warning == is_warning
    assert "quarantine.jsonl" in notice.message


def test_a_store_that_has_rows_is_continued_whatever_its_share(tmp_path: Path) -> None:
    prompts = pool(tmp_path / "p.jsonl", good=60, bad=40)
    store = build_part(prompts, tmp_path / "store", rows=32, config=most(0.5))
    build_small(prompts, store)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="max_quarantined is a share"):
        BuildConfig(max_quarantined=share)


# --- at the end ---------------------------------------------------------------------------------------------------------


def said(report: Any, store: Path) -> str:
    console = Console(file=io.StringIO(), width=400)
    terminal.print_report(console, report, info.inspect(store))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_closing_summary_says_what_became_of_the_lines(tmp_path: Path) -> None:
    prompts = pool(tmp_path / "p.jsonl", good=90, bad=6)
    with prompts.open("a") as file:
        file.write('{"prompt": "Explain 3"}\n{"prompt": "FAIL here"}\n')
    report = build_small(prompts, tmp_path / "store", config=QUARANTINE)
    text = said(report, tmp_path / "store")
    assert "from 98 lines: 1 repeat, 6 quarantined (empty line: 2, not JSON: 2, not a JSON object but list: 1" in text
    assert "1 row without a vector (the text says so: 1)" in text
    assert "were cut" not in text
    again = build_small(None, tmp_path / "store", config=QUARANTINE)
    assert again.pool == report.pool, "a run that computes nothing says the same"


@pytest.mark.parametrize(
    ("left", "right", "is_alike"),
    [
        ("a long common beginning " * 30 + "one", "a long common beginning " * 30 + "two", True),
        ("ﬁne  words", "fine words", False),
        ("Hello", "hello ", False),
        ("漢" * 600, "字" * 600, False),  # unknown to the tokenizer, all of them
    ],
)
def test_what_is_alike_because_of_the_cut(left: str, right: str, is_alike: bool) -> None:
    assert _is_cut_alike(left, right, 128) == is_alike


# --- a pool that grew -----------------------------------------------------------------------------------------------------


def test_a_grown_pool_is_told_the_whole_next_command(tmp_path: Path) -> None:
    folder = tmp_path / "my pools"
    folder.mkdir()
    prompts = pool(folder / "p.jsonl", good=60, bad=0)
    store = folder / "store"
    build_small(prompts, store)
    with prompts.open("a") as file:
        file.writelines(f'{{"prompt": "More {row}"}}\n' for row in range(10))
    with pytest.raises(IdentityMismatchError, match="rows: the store has 60, given 70") as caught:
        build_small(prompts, store)
    words = shlex.split(str(caught.value.hint).partition(": ")[2])
    assert words[:3] == ["embstore", "build", str(prompts)]
    assert "--resume" in words
    given = {name: words[words.index(name) + 1] for name in ("--model", "--out", "--reuse")}
    assert given["--model"] == "fake"
    assert given["--reuse"] == str(store)
    config = dataclasses.replace(CONFIG, reuse=(given["--reuse"],))
    report = build_small(prompts, Path(given["--out"]), config=config)
    assert (report.reused_rows, report.embedded_rows) == (60, 10)
    assert read_journal(store).committed_rows == 60


def test_a_prompt_that_changed_is_shown_where_it_differs(tmp_path: Path) -> None:
    """The pool came through a pipe of the shell, which has another name next time."""
    store, beginning = tmp_path / "store", "The same beginning of two long prompts. " * 3
    build_small(write_lines(tmp_path / "old.jsonl", [{"prompt": f"{beginning}Old end."}]), store)
    changed = write_lines(tmp_path / "new.jsonl", [{"prompt": f"{beginning}New end."}])
    with changed.open("rb") as file, pytest.raises(IdentityMismatchError) as caught:
        build_small(f"/dev/fd/{file.fileno()}", store)
    (row,) = [str(mismatch) for mismatch in caught.value.mismatches if mismatch.field == "row 0"]
    assert row == "row 0: the store has ...f two long prompts. Old end., given ...f two long prompts. New end."
    assert "embstore build PROMPTS --model" in str(caught.value.hint)
    longer = write_lines(tmp_path / "longer.jsonl", [{"prompt": f"{beginning}Old end. And more."}])
    with pytest.raises(IdentityMismatchError) as caught:
        build_small(longer, store)
    (row,) = [str(mismatch) for mismatch in caught.value.mismatches if mismatch.field == "row 0"]
    assert row == "row 0: the store has ...ng prompts. Old end., given ...ng prompts. Old end. And more."
