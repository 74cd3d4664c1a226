"""Stage 0: a line is a row, a repeat or quarantined; ids are unique; what cannot be used is refused and leaves nothing."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
from pathlib import Path

import pytest

from embstore.core.errors import ExitCode, PromptError
from embstore.core.events import Event, Notice, StageAdvanced
from embstore.core.rows import RowRange
from embstore.storage.ingest import ingest
from embstore.storage.prompt_table import PromptTable
from tests.support.stage0 import Stage0, ingested
from tests.support.stores import write_lines


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


def _ingest(source: Path, lines: list[object], *, strict: bool = False, limit: int | None = None) -> Stage0:
    return ingested(write_lines(source, lines), source.parent / "out", strict=strict, limit=limit)


def _refusal(source: Path | str, folder: Path, *, strict: bool = False) -> PromptError:
    with pytest.raises(PromptError) as caught:
        ingested(source, folder, strict=strict)
    assert caught.value.exit_code == ExitCode.ERROR
    assert caught.value.hint
    assert list(folder.iterdir()) == [], "a refused file leaves nothing"
    return caught.value


def md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:16]


def test_lines_rows_and_quarantine_account_for_each_other(source: Path) -> None:
    found = _ingest(source, [{"prompt": "a"}, b"bad\n", {"prompt": "b"}, {"prompt": " a "}, b"\n", {"prompt": "c"}])
    assert found.texts == ["a", "b", "c"]
    assert found.line_rows == [0, -1, 1, 0, -1, 2]
    assert found.multiplicity == [2, 1, 1]
    assert [line for line, _ in found.quarantine] == [2, 5]
    record = found.record
    assert (record.rows, record.lines, record.quarantined, record.repeats) == (3, 6, 2, 1)


def test_the_first_occurrence_is_kept_verbatim(source: Path) -> None:
    found = _ingest(source, [{"prompt": " two\n words", "src": "first"}, {"prompt": "two words", "src": "second"}])
    assert found.prompts == [{"id": md5("two words"), "prompt": " two\n words", "fields": {"src": "first"}}]
    assert found.multiplicity == [2]


def test_a_row_has_its_explicit_id_or_the_one_of_its_text(source: Path) -> None:
    found = _ingest(source, [{"prompt": "a", "id": "mine"}, {"prompt": "b"}, {"prompt": "c", "id": 7}])
    assert found.ids == ["mine", md5("b"), "7"]
    assert [prompt["id"] for prompt in found.prompts] == found.ids


def test_every_id_given_to_a_row_is_an_alias_of_it(source: Path) -> None:
    lines: list[object] = [{"prompt": "a", "id": "one"}, {"prompt": "a", "id": "two"}]
    lines += [{"prompt": "b"}, {"prompt": "b", "id": "late"}]
    found = _ingest(source, lines)
    assert found.ids == ["one", md5("b")], "an id that comes with a repeat names the row, but is not its id"
    assert found.aliases == {"one": 0, "two": 0, "late": 1, md5("b"): 1}
    assert list(found.aliases) == ["one", md5("b"), "two", "late"], "ids of rows by row, then the others by line"


def test_rows_that_derive_one_id_are_numbered_in_order(source: Path) -> None:
    chat = [{"role": "user", "content": "ask"}]
    lines: list[object] = [
        {"prompt": "ask"},
        {"messages": chat},
        {"messages": [{"role": "system", "content": "be brief"}, *chat]},
        {"messages": [*chat, {"role": "assistant", "content": "yes"}]},
    ]
    base = md5("ask")
    assert _ingest(source, lines).ids == [base, f"{base}-2", f"{base}-3", f"{base}-4"]


def test_a_derived_id_gives_way_to_an_explicit_one_wherever_that_stands(source: Path) -> None:
    base = md5("ask")
    chat = {"messages": [{"role": "user", "content": "ask"}]}
    lines: list[object] = [{"prompt": "ask"}, chat, {"prompt": "x", "id": f"{base}-2"}, {"prompt": "y", "id": base}]
    found = _ingest(source, lines)
    assert found.ids == [f"{base}-3", f"{base}-4", f"{base}-2", base]
    assert len(set(found.ids)) == 4
    assert [found.aliases[row_id] for row_id in found.ids] == [0, 1, 2, 3]


def test_one_explicit_id_with_two_texts_is_refused_with_both_lines(source: Path, tmp_path: Path) -> None:
    write_lines(source, [{"prompt": "a", "id": "x"}, {"prompt": "a", "id": "x"}, b"bad\n", {"prompt": "b", "id": "x"}])
    error = _refusal(source, tmp_path / "out")
    assert "'x'" in str(error)
    assert f"line 1 of {source} and line 4 of {source}" in str(error)


def test_a_number_id_and_the_same_text_id_are_one_id(source: Path, tmp_path: Path) -> None:
    write_lines(source, [{"prompt": "a", "id": 7}, {"prompt": "b", "id": "7"}])
    assert "two different prompts" in str(_refusal(source, tmp_path / "out"))


def test_strict_refuses_bad_lines_and_names_the_first_of_them(source: Path, tmp_path: Path) -> None:
    write_lines(source, [{"prompt": "a"}, b"bad\n", {"text": "b"}])
    error = _refusal(source, tmp_path / "out", strict=True)
    assert "2 of 3 lines" in str(error)
    assert "line 2: not JSON" in str(error)
    assert "line 3: no prompt" in str(error)


def test_strict_takes_a_file_without_bad_lines(source: Path) -> None:
    assert _ingest(source, [{"prompt": "a"}], strict=True).texts == ["a"]


def test_a_limit_counts_distinct_rows_and_reads_no_further(source: Path) -> None:
    lines: list[object] = [{"prompt": "a"}, {"prompt": "a"}, b"bad\n", {"prompt": "b"}, {"prompt": "a"}, {"prompt": "c"}]
    found = _ingest(source, lines, limit=2)
    assert found.texts == ["a", "b"]
    assert found.line_rows == [0, 0, -1, 1]
    assert found.record.lines == 4


def test_the_same_rows_come_from_plain_gzip_and_standard_input(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[object] = [{"prompt": f"text {index}"} for index in range(50)]
    plain = _ingest(source, lines)
    content = source.read_bytes()
    # gzip is known by its content, and may come in several members
    members = gzip.compress(content[:500], mtime=0) + gzip.compress(content[500:], mtime=0)
    (source.parent / "other-name").write_bytes(members)
    zipped = ingested(source.parent / "other-name", source.parent / "zipped")
    for data in (content, members):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
        assert ingested("-", source.parent / "out").files == plain.files
    assert zipped.files == plain.files
    assert zipped.record == plain.record


@pytest.mark.parametrize("content", [b'{"prompt": "a"}', b'\xef\xbb\xbf{"prompt": "a"}\r\n', b'{"prompt": "a"}\n\n'[:-1]])
def test_line_ends_and_a_byte_order_mark_do_not_matter(content: bytes, source: Path) -> None:
    assert _ingest(source, [content]).texts == ["a"]


def test_a_byte_order_mark_counts_on_the_first_line_only(source: Path) -> None:
    found = _ingest(source, [b'\xef\xbb\xbf{"prompt": "a"}\n', b'\xef\xbb\xbf{"prompt": "b"}\n'])
    assert found.texts == ["a"]
    assert found.line_rows == [0, -1]


def test_texts_with_odd_line_breaks_stay_one_row(source: Path) -> None:
    texts = ["a\rb", "c\u2028d", "e\x85f", "g\x0bh", "i\nj", "k\\nl", "\x00m"]
    found = _ingest(source, [{"prompt": text} for text in texts])
    assert found.texts == texts
    table = PromptTable(source.parent / "out" / "prompts.jsonl", len(texts))
    assert [prompt.text for prompt in table.read(RowRange(0, len(texts)))] == texts
    assert [prompt.text for prompt in table.sample([5, 0, 5])] == [texts[5], texts[0], texts[5]]


def test_keys_are_the_first_eight_bytes_of_a_rows_identity(source: Path) -> None:
    found = _ingest(source, [{"prompt": " a  b "}, {"messages": [{"role": "user", "content": "c"}]}])
    chat = b'messages\0[{"content":"c","role":"user"}]'
    digests = [hashlib.sha256(b"text\0a b").digest(), hashlib.sha256(chat).digest()]
    assert found.keys == [int.from_bytes(digest[:8], "little") for digest in digests]


def test_the_fingerprint_is_of_ids_and_texts_in_order_and_of_nothing_else(source: Path) -> None:
    def fingerprint(*lines: object) -> str:
        return _ingest(source, list(lines)).record.fingerprint

    first, second = {"prompt": "a"}, {"prompt": "b"}
    reference = fingerprint(first, second)
    assert fingerprint(first, b"bad\n", second, first, {**second, "src": "x"}) == reference
    others = [
        fingerprint(second, first),
        fingerprint(first),
        fingerprint(first, {"prompt": "b "}),
        fingerprint(first, {**second, "id": "x"}),
        fingerprint(first, {"messages": [{"role": "user", "content": "b"}]}),
    ]
    assert len({reference, *others}) == 6


def test_a_line_of_ten_megabytes_is_a_row(source: Path) -> None:
    text = "x " * (5 << 20)
    found = _ingest(source, [{"prompt": text}, {"prompt": "b"}])
    assert found.texts == [text, "b"]


def test_a_line_beyond_the_limit_is_quarantined_and_the_next_ones_are_read(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embstore.core.json_text.MAX_LINE_BYTES", 1 << 20)
    long = json.dumps({"prompt": "x" * (5 << 19)}).encode() + b"\n"
    found = _ingest(source, [{"prompt": "a"}, long, {"prompt": "b"}, long.rstrip()])
    assert found.texts == ["a", "b"]
    assert found.line_rows == [0, -1, 1, -1]
    assert found.quarantine == [(2, "longer than 1 MiB"), (4, "longer than 1 MiB")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "none of its 2 lines is usable (line 1: empty line"),
        (bytes(range(256)) * 40, " lines is usable (line 1: "),
        (b'{"prompt": "caf\xe9"}\n', "line 1: not UTF-8 (byte 15)"),
        (gzip.compress(b""), "the file is empty"),
    ],
    ids=["empty", "blank", "binary", "latin-1", "empty gzip"],
)
def test_a_file_without_a_prompt_is_refused_as_seen(content: bytes, expected: str, source: Path, tmp_path: Path) -> None:
    source.write_bytes(content)
    error = _refusal(source, tmp_path / "out")
    assert str(error).startswith(f"no prompts in {source}: ")
    assert expected in str(error)


def test_a_missing_file_or_a_folder_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    assert "No such file" in str(_refusal(source, tmp_path / "out"))
    assert "contains no prompts file" in str(_refusal(tmp_path / "out", tmp_path / "out"))


@pytest.mark.parametrize("cut", [2, 11, 200, -1])
def test_a_truncated_gzip_is_refused(cut: int, source: Path, tmp_path: Path) -> None:
    """What could be read of it looks like a whole file with fewer prompts."""
    lines = b"".join(json.dumps({"prompt": hashlib.sha256(bytes([i])).hexdigest()}).encode() + b"\n" for i in range(200))
    source.write_bytes(gzip.compress(lines)[:cut])
    error = _refusal(source, tmp_path / "out")
    assert f"reading prompts {source} failed" in str(error)
    assert error.hint == "the file is damaged or truncated"


def test_a_damaged_gzip_is_refused(source: Path, tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b'{"prompt": "a"}\n' * 100))
    data[-8] ^= 1  # its checksum
    source.write_bytes(bytes(data))
    assert "failed" in str(_refusal(source, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("p.jsonl", '{"prompt": "caf\xe9"}\n', "iconv -f WINDOWS-1252"),
        ("p.csv", "prompt\ncaf\xe9\n", "iconv -f WINDOWS-1252"),
        ("p.txt", "Name a river.\n", "jq -Rc '{prompt: .}' FILE"),
        ("p.jsonl", '"Name a river."\n', "jq -c '{prompt: .}' FILE"),
        ("p.json", '[["Name a river."]]', "jq -c '.[] | {messages: .}' FILE"),
        ("p.jsonl", '{"data": [{"prompt": "Name a river."}]}', "jq -c '.NAME[]' FILE"),
        ("p.jsonl", '{"question": "Name a river."}\n' * 2, "--text-field NAME"),
        ("p.jsonl", '{"prompt": 7}\n', "one JSON object per line"),
        ("p.jsonl", "", "one JSON object per line"),
    ],
)
def test_a_file_without_prompts_is_refused_with_its_conversion(tmp_path: Path, name: str, content: str, hint: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(PromptError, match="no prompts in") as caught:
        ingested(tmp_path / name, tmp_path / "out")
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("prompts", "warned"),
    [
        (['"a"', '"b"', "c"], True),
        (['"a"', "b", "c"], False),
        (['"a" or "b"', "[1]", "7"], False),
        ([[{"role": "user", "content": '"a"'}], [{"role": "user", "content": '[{"type": "text", "text": "b"}]'}]], True),
    ],
)
def test_texts_of_a_json_column_that_was_not_decoded_are_warned_of(
    source: Path, prompts: list[object], warned: bool
) -> None:
    folder, notices = source.parent / "out", list[Event]()
    folder.mkdir()
    write_lines(source, [{"prompt": prompt} for prompt in prompts])
    ingest(source, folder, folder, strict=False, limit=None, observer=notices.append)
    messages = [each.message for each in notices if isinstance(each, Notice) and each.is_warning]
    assert ["2 of" in message and "json.loads" in message for message in messages] == [True] * warned


def test_lines_and_rows_are_counted_as_they_are_read_and_written(source: Path) -> None:
    write_lines(source, [{"prompt": f"{line // 2}"} for line in range(5000)])
    folder = source.parent / "out"
    folder.mkdir()
    events: list[Event] = []
    ingest(source, folder, folder, strict=False, limit=None, observer=events.append)
    advanced = [event for event in events if isinstance(event, StageAdvanced)]
    assert sum(event.count for event in advanced if event.stage == "prompts") == 5000
    assert len(advanced) >= 6
    assert 2000 <= sum(event.count for event in advanced if event.stage == "rows") <= 2500
