"""A prompts file, or a file of a store, from a stranger: any bytes are a value or a typed error, and take bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import tracemalloc
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from embstore.core.decode import decode_array_header, parse_json, printable, printable_json
from embstore.core.errors import ConfigError, CorruptStoreError, EmbstoreError, PromptError
from embstore.core.format import decode_manifest, decode_metadata, decode_neighbors_spec
from embstore.core.json_text import MAX_LINE_BYTES
from embstore.core.prompts import Prompt, decode_row, parse_line
from embstore.core.records import (
    JournalState,
    ReuseRecord,
    decode_chunk_table,
    decode_journal,
    encode_journal_header,
    replay,
)
from embstore.core.spec import decode_spec
from embstore.flow.first_checks import _model_of_last_run
from embstore.storage.ingest import ingest
from embstore.views.info import inspect, neighbors_of
from embstore.views.terminal import print_info, print_neighbors
from tests.support.forged import HEADERS, RAW, damaged, dumps, mutated
from tests.support.stage0 import ingested
from tests.support.stores import build_small, with_weighting, write_lines
from tests.support.tally import Counter

pytestmark = pytest.mark.usefixtures("without_syncs")

Draw = Callable[[st.SearchStrategy[Any]], Any]

SHORT, COMPLETE = 60, 1200  # documents of each kind
SHORT_FILES, COMPLETE_FILES = 25, 600  # prompts files


def _run(test: Callable[[st.DataObject], None], *, examples: int, derandomize: bool) -> None:
    """Give ``test`` that many examples: the same ones, or others at each run."""
    settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=derandomize,
        print_blob=not derandomize,
        suppress_health_check=list(HealthCheck),
    )(given(st.data())(test))()


# --- documents, decoded directly -------------------------------------------------------------------------------------


def _decode_journal(content: bytes) -> object:
    return replay(decode_journal(content, name="journal.jsonl")[0])


DECODERS: Mapping[str, tuple[str, Callable[[bytes], object]]] = {
    "spec": ("spec.json", decode_spec),
    "manifest": ("manifest.json", decode_manifest),
    "chunk table": ("chunks.json", decode_chunk_table),
    "metadata": ("weights/*.json", lambda content: decode_metadata(content, name="x.json")),
    "neighbours": ("neighbors/*/spec.json", lambda content: decode_neighbors_spec(content, name="x.json")),
    "ids": ("ids.json", lambda content: parse_json(content, name="ids.json")),
    "row": ("prompts.jsonl", decode_row),
    "journal": ("journal.jsonl", _decode_journal),
    "array header": ("keys.npy", lambda content: decode_array_header(content, name="x.npy")),
}


def _hostile_document(kind: str, original: bytes, draw: Draw) -> bytes:
    if kind == "array header":
        return draw(st.sampled_from(HEADERS)) if draw(st.booleans()) else damaged(original[:256], draw)
    if kind in ("row", "journal"):
        original = draw(st.sampled_from(original.splitlines()))
    if draw(st.integers(0, 3)) == 0:
        return damaged(original, draw)
    if kind != "journal":
        return dumps(mutated(json.loads(original), draw))
    body = dumps(mutated(json.loads(original.rpartition(b"\t")[0]) | {"seq": 1}, draw))
    return encode_journal_header() + body + b"\t%08x\n" % zlib.crc32(body)


def _judge_documents(kind: str, store: Path, tally: Counter, *, examples: int, derandomize: bool) -> None:
    pattern, decode = DECODERS[kind]
    (path,) = store.glob(pattern)
    original = path.read_bytes()

    def ends_in_a_value_or_a_typed_error(data: st.DataObject) -> None:
        content = _hostile_document(kind, original, data.draw)
        is_sound = True
        try:
            decode(content)
        except EmbstoreError:
            pass
        except Exception:
            is_sound = False
            raise
        finally:
            tally(f"hostile {kind}, decoded", losses=not is_sound)

    _run(ends_in_a_value_or_a_typed_error, examples=examples, derandomize=derandomize)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_hostile_document_is_a_value_or_a_typed_error(kind: str, finished_store: Path, tally: Counter) -> None:
    _judge_documents(kind, finished_store, tally, examples=SHORT, derandomize=True)


@pytest.mark.faults
@pytest.mark.parametrize("kind", DECODERS)
def test_many_hostile_documents_are_values_or_typed_errors(kind: str, finished_store: Path, tally: Counter) -> None:
    _judge_documents(kind, finished_store, tally, examples=COMPLETE, derandomize=False)


@pytest.mark.parametrize("raw", [raw for raw in RAW if not raw.text.startswith("1.")], ids=lambda raw: raw.text[:12])
def test_json_that_only_some_readers_take_is_refused(raw: Any) -> None:
    with pytest.raises(CorruptStoreError, match=r"x\.json"):
        parse_json(dumps({"a": raw}), name="x.json")


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), b'{"a": "\xed\xa0\x80"}', b"", b"\0"])
def test_json_in_another_encoding_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptStoreError, match=r"x\.json is not valid JSON"):
        parse_json(content, name="x.json")


@pytest.mark.parametrize("header", HEADERS)
def test_an_array_header_is_read_and_never_evaluated(header: bytes) -> None:
    """Pickles, archives, and expressions are no headers; what is one says no more than type, order and shape."""
    try:
        found = decode_array_header(header, name="x.npy")
    except CorruptStoreError:
        return
    assert found.descr in ("<f4", "<f8", ">f4")
    assert found.offset == len(header)
    assert math.prod(found.shape) >= 0


@pytest.mark.parametrize("version", [True, 1.0, "1", None, [1], 2**70, -1])
def test_a_version_that_is_no_whole_number_is_damage(version: object, finished_store: Path) -> None:
    content = dumps(json.loads((finished_store / "spec.json").read_bytes()) | {"format_version": version})
    with pytest.raises(CorruptStoreError, match="format_version"):
        decode_spec(content)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 0},
        {"rows": 2**31},
        {"rows": -70},
        {"chunk_rows": 0},
        {"chunk_rows": -16},
        {"chunk_rows": 2**40, "window_rows": 2**40},
        {"window_rows": 0},
        {"window_rows": 17},
        {"rows": 2**31 - 1, "chunk_rows": 16, "window_rows": 16},
        {"compressor": "pickle"},
    ],
)
def test_a_spec_of_sizes_that_no_store_has_is_refused(changes: dict[str, object], finished_store: Path) -> None:
    with pytest.raises(CorruptStoreError, match=r"spec\.json"):
        decode_spec(dumps(json.loads((finished_store / "spec.json").read_bytes()) | changes))


@pytest.mark.parametrize("digest", ["..", "../x", "/etc/x", "a/b", "", "a.b", "\0", "x" * 65, "É"])
@pytest.mark.parametrize("place", ["neighbors", "names"])
def test_a_digest_that_would_name_another_place_is_refused(place: str, digest: str, finished_store: Path) -> None:
    manifest = json.loads((finished_store / "manifest.json").read_bytes())
    manifest[place] = digest if place == "neighbors" else {"default": digest}
    with pytest.raises(CorruptStoreError, match=place):
        decode_manifest(dumps(manifest))


def test_a_manifest_lists_no_file_but_the_stores_own(finished_store: Path) -> None:
    manifest = json.loads((finished_store / "manifest.json").read_bytes())
    for name in ("../outside", "/etc/passwd", "journal.jsonl", "weights/../../x", "a"):
        files = manifest["files"] | {name: {"bytes": 1, "sha256": "0" * 64}}
        with pytest.raises(CorruptStoreError, match="which is not a file of this store"):
            decode_manifest(dumps(manifest | {"files": files}))


@pytest.mark.parametrize("line", ["[]", '"x"', "1", "null", "{}", '{"model": 7}', '{"model": ["x"]}', "[" * 100_000, "{"])
def test_the_log_of_runs_is_nobodys_instruction(line: str, tmp_path: Path) -> None:
    """A resume without --model looks into ``runs.jsonl`` for the model; a line that is no log entry names none."""
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match="no model was given"):
        _model_of_last_run(tmp_path, JournalState(reuse=ReuseRecord(stores=[])))


# --- prompts files ---------------------------------------------------------------------------------------------------

GOOD = {"id": "x", "prompt": "a b", "messages": None, "src": {"deep": [1, {"b": [2.5]}]}}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "name": "n"}]}


def _hostile_line(draw: Draw) -> bytes:
    record = draw(st.sampled_from([GOOD, CHAT, {"prefix": CHAT}, {"prefix": "text"}]))
    if draw(st.booleans()):
        return dumps(mutated(record, draw)).replace(b"\n", b" ")
    return damaged(json.dumps(record).encode(), draw).replace(b"\n", b" ")


def _judge_prompts_files(folder: Path, tally: Counter, *, examples: int, derandomize: bool) -> None:
    source = folder / "prompts.jsonl"

    def numbers_its_lines(data: st.DataObject) -> None:
        numbered = [b'{"prompt": "marker %d"}' % index for index in range(3)]
        lines = [
            line
            for mark in numbered
            for line in (mark, *(_hostile_line(data.draw) for _ in range(data.draw(st.integers(0, 4)))))
        ]
        content = b"\n".join(lines) + b"\n"
        packing = data.draw(st.sampled_from(["plain", "plain", "gzip", "damaged gzip"]))
        if packing != "plain":
            content = gzip.compress(content, mtime=0)
        source.write_bytes(damaged(content, data.draw) if packing == "damaged gzip" else content)
        is_sound = False
        try:
            found = ingested(source, folder / "out")
            if packing != "damaged gzip":
                assert found.record.lines == len(lines) == len(found.line_rows)
                assert found.record.rows + found.record.repeats + found.record.quarantined == len(lines)
                assert [line for line, _ in found.quarantine] == [n for n, row in enumerate(found.line_rows, 1) if row < 0]
                for index, mark in enumerate(numbered):
                    assert found.texts[found.line_rows[lines.index(mark)]] == f"marker {index}", "numbers shifted"
            is_sound = True
        except PromptError:
            is_sound = True
        finally:
            tally("hostile prompts file", losses=not is_sound)

    _run(numbers_its_lines, examples=examples, derandomize=derandomize)


def test_every_line_of_a_hostile_prompts_file_has_its_number(tmp_path: Path, tally: Counter) -> None:
    _judge_prompts_files(tmp_path, tally, examples=SHORT_FILES, derandomize=True)


@pytest.mark.faults
def test_every_line_of_many_hostile_prompts_files_has_its_number(tmp_path: Path, tally: Counter) -> None:
    _judge_prompts_files(tmp_path, tally, examples=COMPLETE_FILES, derandomize=False)


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(st.binary(max_size=200))
@example(b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}")
@example(b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"}")
@example(b'{"id": 1e999, "prompt": "a"}')
@example(b'{"prompt": "\\ud83d"}')
@example(b"\x1f\x8b")
def test_a_taken_line_is_a_row_that_reads_back(line: bytes) -> None:
    found = parse_line(line)
    if isinstance(found, Prompt):
        assert found.digest
        assert found.derived_id
        found.rendered.encode()


def _peak_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _ingest(source: Path, folder: Path) -> None:
    folder.mkdir()
    ingest(source, folder, folder, strict=False, limit=None)


def _packed(path: Path, pieces: list[bytes]) -> Path:
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1, mtime=0) as file:
        for piece in pieces:
            file.write(piece)
    return path


def test_a_small_file_of_a_great_many_lines_takes_no_memory(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        source = _packed(tmp_path / "bomb.gz", [b'{"prompt": "a"}\n', b"\n" * lines])
        return _peak_of(lambda: _ingest(source, tmp_path / f"out-{lines}"))

    few, many = peak(30_000), peak(60_000)
    # 16 bytes a line until the buffer of line_rows.npy is full; a list of reasons would take 150, without end
    assert many < few + 30_000 * 20, "a line that is no new row is written down, not kept"


def test_a_small_file_of_one_endless_line_takes_bounded_memory(tmp_path: Path) -> None:
    source = _packed(tmp_path / "bomb.gz", [b'{"prompt": "a"}\n', *[b" " * (1 << 20)] * 200])
    assert _peak_of(lambda: _ingest(source, tmp_path / "out")) < 5 * MAX_LINE_BYTES
    assert source.stat().st_size < 2 << 20
    assert "longer than 64 MiB" in (tmp_path / "out" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize("cut", [1, 10, 30, -1])
def test_a_packed_file_that_was_cut_or_extended_is_no_shorter_file(cut: int, tmp_path: Path) -> None:
    packed = gzip.compress(b'{"prompt": "a"}\n' * 100, mtime=0)
    (tmp_path / "prompts.gz").write_bytes(packed[:-cut] if cut > 0 else packed + b"garbage")
    with pytest.raises(PromptError, match=r"damaged or truncated|reading prompts"):
        ingested(tmp_path / "prompts.gz", tmp_path / "out")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ".", "/dev/null/x"])
def test_a_path_that_cannot_be_one_is_a_typed_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError):
        ingested(tmp_path / name, tmp_path / "out")
    for look in (inspect, lambda path: neighbors_of(path, "x")):
        with pytest.raises(EmbstoreError):
            look(tmp_path / name)


# --- what a terminal is sent -----------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;title\x07 [red]bold[/red] [/nothing] :skull: \x9b31m \u202eexe.png \x7f"


def test_texts_and_ids_cannot_style_or_command_a_terminal(tmp_path: Path) -> None:
    lines = [{"id": f"../{index}\x1b[31m[/dim]\n", "prompt": f"{EVIL} {index}", "src": EVIL} for index in range(12)]
    lines.append({"id": "../../etc/passwd", "prompt": "path-like"})
    build_small(write_lines(tmp_path / "prompts.jsonl", lines), tmp_path / "store", config=with_weighting(k=3))
    shown = io.StringIO()
    console = Console(file=shown, width=400, emoji=False)
    print_info(console, inspect(tmp_path / "store", by="src"))
    first = lines[0]["id"]
    print_neighbors(console, first, neighbors_of(tmp_path / "store", first))
    text = shown.getvalue()
    assert all(character == "\n" or character.isprintable() for character in text)
    for harmless in ("\\x1b[2J", "[red]bold[/red]", "[/nothing]", ":skull:", "\\x9b31m", "\\u202eexe.png", "\\x7f"):
        assert harmless in text
    assert not any(path.name == "passwd" for path in tmp_path.rglob("*"))


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(st.text(max_size=20))
def test_what_is_printed_holds_no_character_that_a_terminal_acts_on(text: str) -> None:
    shown = printable(text)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)
    assert shown == text or not re.fullmatch("[a-z\u4e00-\u9fff ]*", text)
    assert json.loads(printable_json(json.dumps({"a": text}, ensure_ascii=False, indent=2))) == {"a": text}
