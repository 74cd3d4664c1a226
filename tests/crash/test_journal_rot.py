"""Damage to the journal: a torn tail leaves the committed prefix, anything else is refused and nothing is touched."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from embstore.core.errors import CorruptStoreError, EmbstoreError, ExitCode, IdentityMismatchError
from embstore.core.records import WindowRecord, decode_journal
from embstore.flow.build import BuildReport
from embstore.storage.journal import read_journal
from embstore.storage.reader import open_store
from embstore.storage.verify import VerifyReport
from embstore.views.info import inspect, verify
from tests.support.fake import FakeSource
from tests.support.rot import CHECKED, every_byte_flipped, outcome, readings, served_wrongly, tree_state
from tests.support.stores import (
    WINDOWS,
    HookedSource,
    build_part,
    build_small,
    journal_records,
    snapshot,
    write_lines,
)
from tests.support.tally import Counter

pytestmark = pytest.mark.usefixtures("without_syncs")

JOURNAL = "journal.jsonl"
PAGE = 4096


@pytest.fixture(scope="module")
def longer_store(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished store with two of three windows committed; read it, never write to it."""
    return build_part(small_prompts, tmp_path_factory.mktemp("longer") / "store", rows=64)


def _of(original: Path, tmp_path: Path, journal: bytes) -> Path:
    """A copy of a store with this journal."""
    store = tmp_path / "store"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(original, store, symlinks=True)
    (store / JOURNAL).write_bytes(journal)
    return store


def _committed(journal: bytes) -> list[int]:
    """Windows whose lines are whole, counted without the package's decoder."""
    lines = journal.split(b"\n")[:-1]
    return list(range(len(lines) - 3))


def _names_the_journal(store: Path) -> bool:
    """Whether verify reports it: as damage of a finished store, as a torn tail of an unfinished one."""
    report = outcome(lambda: verify(store))
    if isinstance(report, EmbstoreError):
        return "journal" in str(report)
    assert isinstance(report, VerifyReport), report
    found = {finding.path for finding in report.findings}
    # what the journal lost is what the manifest has too much
    return bool(found & {JOURNAL, "manifest.json"}) or any(note.startswith(JOURNAL) for note in report.notes)


def _served_of_an_unfinished(store: Path, whole: Path, committed: list[int]) -> list[str]:
    """What readers make of an unfinished store beyond the committed windows' rows."""
    problems = []
    rows = [row for window in committed for row in range(*WINDOWS[window])]
    info = outcome(lambda: inspect(store).committed_rows)
    if info != len(rows) and not isinstance(info, EmbstoreError):
        problems.append(f"inspect says {info} rows")
    opened = outcome(lambda: open_store(store, partial=True))
    if isinstance(opened, EmbstoreError):
        return problems if not committed else [*problems, f"refused: {opened}"]
    expected = open_store(whole)
    if opened.rows([expected.ids[row] for row in rows]).tobytes() != expected.rows(expected.ids[: len(rows)]).tobytes():
        problems.append("other rows")
    beyond = expected.ids[len(rows) :: 5]
    problems += [
        f"{prompt_id} is served, which nothing committed"
        for prompt_id in beyond
        if not isinstance(outcome(lambda prompt_id=prompt_id: opened.rows([prompt_id])), EmbstoreError)
    ]
    return problems


def _cut_and_resumed(
    lengths: Iterable[int], original: Path, finished: Path, prompts: Path, tmp_path: Path, tally: Counter, *, every: int = 1
) -> None:
    """The journal cut at each length: the committed prefix is served, and a resume (at every n-th cut) makes the rest."""
    content, reference = (original / JOURNAL).read_bytes(), snapshot(finished)
    expected = readings(finished, CHECKED)
    always = set(_around_every_line(content))
    failures = []
    for length in lengths:
        store = _of(original, tmp_path, content[:length])
        committed = _committed(content[:length])
        problems = [] if list(read_journal(store).windows) == committed else ["another prefix is read"]
        # an unfinished store that lost whole lines is one that was killed earlier
        is_damage = original == finished or length == 0 or not content[:length].endswith(b"\n")
        problems += ["not found by verify"] if is_damage and not _names_the_journal(store) else []
        if original == finished:
            problems += served_wrongly(readings(store, CHECKED), expected)
        else:
            problems += _served_of_an_unfinished(store, finished, committed)
        if length % every == 0 or length in always:
            problems += _resume_problems(store, prompts, reference, committed, repair=original == finished)
        tally("journal cut at every byte", losses=bool(problems))
        failures += [f"cut at {length}: {problem}" for problem in problems]
    assert not failures, "\n".join(failures)


def _resume_problems(
    store: Path, prompts: Path, reference: dict[str, str], committed: list[int], *, repair: bool
) -> list[str]:
    repaired = outcome(lambda: verify(store, repair=True)) if repair else None
    source = FakeSource()
    resumed = outcome(lambda: build_small(prompts, store, source=source))
    if not isinstance(resumed, BuildReport):
        return [f"after {repaired} the resume gave {resumed}"]
    if source.calls != [rows for window, rows in enumerate(WINDOWS) if window not in committed]:
        return [f"the resume computed {source.calls}"]
    is_whole = snapshot(store) == reference and len(read_journal(store).windows) == len(WINDOWS)
    return [] if is_whole else ["other bytes after the resume"]


def _around_every_line(content: bytes) -> list[int]:
    """Lengths just before and after each end of a line, in the middle of each, and the ends of the file."""
    ends = [position + 1 for position, byte in enumerate(content) if byte == 10]
    lengths = {length for end in ends for length in (end - 10, end - 2, end - 1, end, end + 1, end + 60)}
    return sorted(length for length in {0, 1, *lengths} if 0 <= length < len(content))


def test_a_journal_cut_at_every_byte_reads_as_its_committed_prefix(longer_store: Path, tmp_path: Path) -> None:
    content = (longer_store / JOURNAL).read_bytes()
    records = journal_records(longer_store)
    for length in range(len(content) + 1):
        found, valid_bytes = decode_journal(content[:length], name=JOURNAL)
        whole_lines = content[:length].count(b"\n")
        assert found == records[: max(0, whole_lines - 1)]
        assert valid_bytes == content[:length].rfind(b"\n") + 1


@pytest.mark.parametrize("state", ["longer_store", "finished_store"])
def test_a_journal_cut_around_every_line_is_resumed_to_the_same_bytes(
    state: str, finished_store: Path, small_prompts: Path, tmp_path: Path, tally: Counter, request: pytest.FixtureRequest
) -> None:
    original: Path = request.getfixturevalue(state)
    lengths = _around_every_line((original / JOURNAL).read_bytes())
    _cut_and_resumed(lengths, original, finished_store, small_prompts, tmp_path, tally)


@pytest.mark.faults
@pytest.mark.parametrize("state", ["longer_store", "finished_store"])
def test_a_journal_cut_at_every_byte_is_resumed_to_the_same_bytes(
    state: str, finished_store: Path, small_prompts: Path, tmp_path: Path, tally: Counter, request: pytest.FixtureRequest
) -> None:
    original: Path = request.getfixturevalue(state)
    lengths = range(len((original / JOURNAL).read_bytes()))
    # every cut is judged; what a resume then does depends on the lines that are left, so not each of them is resumed
    every = 5 if state == "finished_store" else 3
    _cut_and_resumed(lengths, original, finished_store, small_prompts, tmp_path, tally, every=every)


# --- lines that are damaged, doubled, missing, swapped ------------------------------------------------------------------


def _lines(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


def _flipped(lines: list[bytes], at: int) -> list[bytes]:
    line = bytearray(lines[at])
    line[len(line) // 2] ^= 1
    return [*lines[:at], bytes(line), *lines[at + 1 :]]


def _zeroed(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], bytes(len(lines[at]) - 1) + b"\n", *lines[at + 1 :]]


def _swallowed(lines: list[bytes], at: int) -> list[bytes]:
    """Zeros over a line and its end: it becomes part of the next."""
    return [*lines[:at], bytes(len(lines[at])), *lines[at + 1 :]]


def _emptied(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], b"\n", *lines[at + 1 :]]


def _doubled(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[: at + 1], lines[at], *lines[at + 1 :]]


def _missing(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], *lines[at + 1 :]]


def _swapped(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]


def _joined(lines: list[bytes], at: int) -> list[bytes]:
    """The end of a line flipped into another byte: it becomes part of the next."""
    return [*lines[:at], lines[at][:-1] + b"\x0b", *lines[at + 1 :]]


IN_THE_MIDDLE = (_flipped, _zeroed, _swallowed, _emptied, _doubled, _missing, _swapped, _joined)


@pytest.mark.parametrize("state", ["longer_store", "finished_store"])
@pytest.mark.parametrize("damage", IN_THE_MIDDLE, ids=lambda damage: damage.__name__[1:])
def test_a_damaged_line_in_the_middle_is_refused_by_everybody_and_nothing_is_touched(
    damage: Callable[[list[bytes], int], list[bytes]],
    state: str,
    small_prompts: Path,
    tmp_path: Path,
    tally: Counter,
    request: pytest.FixtureRequest,
) -> None:
    original: Path = request.getfixturevalue(state)
    lines = _lines((original / JOURNAL).read_bytes())
    # a line that is joined with the last one is a torn tail, like any damage to the last one
    for at in range(len(lines) - (2 if damage in (_joined, _swallowed) else 1)):
        store = _of(original, tmp_path, b"".join(damage(lines, at)))
        before = tree_state(store, apart_from=(".lock",))
        source = FakeSource()
        refusals = [
            outcome(action)
            for action in (
                lambda store=store: verify(store),
                lambda store=store: verify(store, repair=True),
                lambda store=store: build_small(None, store),
                lambda store=store, source=source: build_small(small_prompts, store, source=source),
                lambda store=store: open_store(store, partial=True),
                lambda store=store: inspect(store),
            )
        ]
        is_found = all(isinstance(refusal, CorruptStoreError) and JOURNAL in str(refusal) for refusal in refusals)
        is_untouched = tree_state(store, apart_from=(".lock",)) == before
        tally("damaged journal line", losses=not (is_found and is_untouched and not source.calls))
        assert is_found, f"line {at + 1}: {refusals}"
        assert is_untouched
        assert source.calls == []
        if at > 0:
            assert "build into another --out" in str(refusals[0].hint)  # type: ignore[attr-defined]


@pytest.mark.parametrize("state", ["longer_store", "finished_store"])
@pytest.mark.parametrize("damage", [_flipped, _zeroed, _swallowed, _emptied, _missing])
def test_a_damaged_last_line_is_found_and_its_window_computed_again(
    damage: Callable[[list[bytes], int], list[bytes]],
    state: str,
    small_prompts: Path,
    finished_store: Path,
    tmp_path: Path,
    tally: Counter,
    request: pytest.FixtureRequest,
) -> None:
    """It looks like a line that was torn before it was acknowledged, so it is treated as one: never served, made again."""
    original: Path = request.getfixturevalue(state)
    lines = _lines((original / JOURNAL).read_bytes())
    store = _of(original, tmp_path, b"".join(damage(lines, len(lines) - 1)))
    last = len(lines) - 4
    # an unfinished store without its last line is one that was killed earlier
    is_found = _names_the_journal(store) or (damage is _missing and state == "longer_store")
    if state == "finished_store":
        verify(store, repair=True)
    source = FakeSource()
    build_small(None, store, source=source)
    is_mended = snapshot(store) == snapshot(finished_store)
    tally("damaged journal line", losses=not (is_found and is_mended))
    assert is_found
    assert source.calls == WINDOWS[last:]
    assert is_mended


@pytest.mark.parametrize("state", ["longer_store", "finished_store"])
def test_a_doubled_last_line_is_refused(state: str, tmp_path: Path, tally: Counter, request: pytest.FixtureRequest) -> None:
    original: Path = request.getfixturevalue(state)
    lines = _lines((original / JOURNAL).read_bytes())
    store = _of(original, tmp_path, b"".join(_doubled(lines, len(lines) - 1)))
    tally("damaged journal line", losses=not isinstance(outcome(lambda: verify(store)), CorruptStoreError))
    for action in (lambda: verify(store), lambda: verify(store, repair=True), lambda: build_small(None, store)):
        with pytest.raises(CorruptStoreError, match=r"journal\.jsonl: line \d has sequence number") as caught:
            action()
        assert caught.value.exit_code == ExitCode.CORRUPT


@pytest.mark.parametrize("tail", [bytes(1), bytes(100), bytes(PAGE), bytes(PAGE) + b"\n", b"\n"], ids=len)
def test_zeros_after_the_last_line_are_a_torn_tail(
    tail: bytes, longer_store: Path, finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    """What ext4 leaves when the length of a file reached the disk and its bytes did not."""
    content = (longer_store / JOURNAL).read_bytes()
    for journal in (content + tail, content[:-30] + bytes(30) + tail):
        store = _of(longer_store, tmp_path, journal)
        committed = list(read_journal(store).windows)
        is_found = _names_the_journal(store)
        problems = _served_of_an_unfinished(store, finished_store, committed)
        source = FakeSource()
        build_small(None, store, source=source)
        is_mended = snapshot(store) == snapshot(finished_store)
        tally("zeros at the end of the journal", losses=not (is_found and is_mended and not problems))
        assert is_found
        assert problems == []
        assert committed == ([0, 1] if journal.startswith(content) else [0])
        assert source.calls == WINDOWS[len(committed) :]
        assert is_mended


@pytest.mark.parametrize("length", [1, 100, PAGE])
def test_zeros_after_the_journal_of_a_finished_store_are_found(length: int, store: Path, finished_store: Path) -> None:
    with (store / JOURNAL).open("ab") as journal:
        journal.write(bytes(length))
    assert [finding.path for finding in verify(store).findings] == [JOURNAL]
    assert [finding.path for finding in verify(store, repair=True).findings] == [JOURNAL], "found before it was repaired"
    build_small(None, store)
    assert verify(store).findings == []
    assert snapshot(store) == snapshot(finished_store)


@pytest.mark.faults
@pytest.mark.parametrize("state", ["longer_store", "finished_store"])
def test_a_flipped_bit_in_any_byte_of_the_journal_is_found_and_serves_nothing_wrong(
    state: str, finished_store: Path, tmp_path: Path, tally: Counter, request: pytest.FixtureRequest
) -> None:
    original: Path = request.getfixturevalue(state)
    content = (original / JOURNAL).read_bytes()
    store = _of(original, tmp_path, content)
    failures = []
    for damage in every_byte_flipped(content, random.Random(state)):
        damage.apply(store / JOURNAL)
        problems = [] if _names_the_journal(store) else ["not found by verify"]
        windows = outcome(lambda: list(read_journal(store).windows))
        if isinstance(windows, list):
            problems += _served_of_an_unfinished(store, finished_store, windows) if state == "longer_store" else []
        elif not isinstance(windows, CorruptStoreError | IdentityMismatchError):
            problems.append(f"reading gave {windows}")
        tally("flipped bit", losses=bool(problems))
        failures += [f"{damage.what}: {problem}" for problem in problems]
    assert not failures, "\n".join(failures)


def test_lines_of_another_store_vouch_for_nothing_here(longer_store: Path, finished_store: Path, tmp_path: Path) -> None:
    """A line with a checksum and a place of its own, but about other bytes."""
    prompts = write_lines(tmp_path / "other.jsonl", [{"prompt": f"another {index}"} for index in range(70)])
    other = build_part(prompts, tmp_path / "other", rows=64)
    lines, others = _lines((longer_store / JOURNAL).read_bytes()), _lines((other / JOURNAL).read_bytes())
    store = _of(longer_store, tmp_path, b"".join([*lines[:3], others[3], lines[4]]))
    assert {finding.window for finding in verify(store).findings} == {0}
    with pytest.raises(CorruptStoreError, match=r"c\.0\.0"):
        open_store(store, partial=True).read_chunk(0)
    source = FakeSource()
    build_small(None, store, source=source)
    assert source.calls == [WINDOWS[0], WINDOWS[2]]
    assert snapshot(store) == snapshot(finished_store)
    assert len([record for record in journal_records(store) if isinstance(record, WindowRecord)]) == 4


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 5], ids=lambda kept: f"{kept} lines left")
def test_nothing_is_built_under_a_manifest_that_the_journal_does_not_support(
    kept: int, finished_store: Path, small_prompts: Path, tmp_path: Path
) -> None:
    """A resume without a repair: readers see the published bytes, or a refusal, at every moment of it."""
    lines = _lines((finished_store / JOURNAL).read_bytes())
    store = _of(finished_store, tmp_path, b"".join(lines[:kept]))
    expected = {name: path.read_bytes() for name, path in _published(finished_store).items()}
    wrong = []

    def look(first_row: int) -> None:
        if (store / "manifest.json").exists():
            now = {name: path.read_bytes() for name, path in _published(store).items()}
            wrong.extend(f"{name} while row {first_row} is computed" for name in expected if now.get(name) != expected[name])

    resumed = outcome(lambda: build_small(small_prompts, store, source=HookedSource(look)))
    assert wrong == []
    assert isinstance(resumed, EmbstoreError) or snapshot(store) == snapshot(finished_store)


def _published(store: Path) -> dict[str, Path]:
    return {path.relative_to(store).as_posix(): path for path in store.rglob("*.npy")}
