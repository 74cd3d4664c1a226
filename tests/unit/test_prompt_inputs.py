"""However the bytes of a prompts file arrive, it is the same file: pipes and compression; damage is never a short file."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embstore.core.config import USUAL_FIELDS
from embstore.core.errors import PromptError
from embstore.core.prompts import Prompt
from embstore.storage.prompt_source import open_source
from tests.support.stage0 import Stage0, ingested
from tests.support.stores import build_small, small_lines, snapshot, write_lines

pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
pq = pytest.importorskip("pyarrow.parquet")


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}
ALL = {"plain": bytes, **PACKERS}


@contextlib.contextmanager
def pipe(content: bytes, pieces: Sequence[int] = ()) -> Iterator[str]:
    """The path of a pipe that delivers ``content`` in pieces of these sizes, the last one again and again."""
    reading, writing = os.pipe()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb", buffering=0) as file:
            at, sizes = 0, iter(pieces)
            size = 1 << 16
            while at < len(content):
                size = next(sizes, size)
                file.write(content[at : at + size])
                at += size

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)
        thread.join()


def same(left: Stage0, right: Stage0) -> None:
    assert left.files == right.files
    assert left.record == right.record


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "p.jsonl", [*small_lines(), b"no JSON\n", {"prompt": "Explain number 3.", "id": "alias"}])


@pytest.mark.parametrize("packing", ALL)
def test_a_pipe_is_the_file(packing: str, lines: Path, tmp_path: Path) -> None:
    expected = ingested(lines, tmp_path / "expected")
    with pipe(ALL[packing](lines.read_bytes()), [3, 1, 4096]) as path:
        same(ingested(path, tmp_path / "found"), expected)


def test_a_named_fifo_is_the_file(lines: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    feeder = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(gzip.compress(lines.read_bytes())))
    feeder.start()
    same(ingested(tmp_path / "fifo", tmp_path / "found"), ingested(lines, tmp_path / "expected"))
    feeder.join()


@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
def test_standard_input_is_the_file(source: str, lines: Path, tmp_path: Path) -> None:
    """In a process of its own, once through a pipe and once from the file."""
    code = """
import sys
from pathlib import Path
from tests.support.stage0 import ingested
print(ingested(sys.argv[1], Path(sys.argv[2])).record.fingerprint)
"""
    expected = ingested(lines, tmp_path / "expected").record.fingerprint
    for number, content in enumerate((lines.read_bytes(), bz2.compress(lines.read_bytes()))):
        for as_file in (False, True):
            out = tmp_path / f"{number}{as_file}"
            (tmp_path / "stdin").write_bytes(content)
            with (tmp_path / "stdin").open("rb") as file:
                given: dict[str, Any] = {"stdin": file} if as_file else {"input": content}
                command = [sys.executable, "-c", code, source, str(out)]
                done = subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2], **given)
            assert done.stdout.decode().strip() == expected


@pytest.mark.parametrize("kind", ["parquet", "arrow-file", "arrow-stream"])
@pytest.mark.parametrize("packing", ["plain", "gz", "zst"])
def test_a_table_through_a_pipe_is_the_table(kind: str, packing: str, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"id": f"t{row}", "prompt": f"Text number {row}"} for row in range(300)])
    path = tmp_path / "table"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        writer = pa.ipc.new_file if kind == "arrow-file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, writer(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=70)
    expected = ingested(write_lines(tmp_path / "p.jsonl", table.to_pylist()), tmp_path / "expected")
    same(ingested(path, tmp_path / "file"), expected)
    with pipe(ALL[packing](path.read_bytes()), [1, 2, 1000]) as source:
        same(ingested(source, tmp_path / "pipe"), expected)
    assert {each.name for each in (tmp_path / "pipe").iterdir()} == {each.name for each in (tmp_path / "file").iterdir()}


def test_a_table_too_large_to_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"prompt": [f"{row} text" for row in range(5000)]}), tmp_path / "p.parquet", compression="none")
    monkeypatch.setattr("embstore.core.inputs.MAX_SPOOL_BYTES", 10_000)
    with (
        pipe((tmp_path / "p.parquet").read_bytes()) as source,
        pytest.raises(PromptError, match=r"has more than 9\.8 KiB, and is read from both ends") as caught,
    ):
        ingested(source, tmp_path / "out")
    assert "uncompressed file" in str(caught.value.hint)
    assert ingested(tmp_path / "p.parquet", tmp_path / "file").record.rows == 5000


@pytest.mark.parametrize("packing", PACKERS)
def test_members_that_follow_each_other_are_one_file(packing: str, lines: Path, tmp_path: Path) -> None:
    content = lines.read_bytes()
    parts = [content[:100], b"", content[100:5000], content[5000:]]
    packed = b"".join(PACKERS[packing](part) for part in parts)
    (tmp_path / "packed").write_bytes(packed)
    same(ingested(tmp_path / "packed", tmp_path / "found"), ingested(lines, tmp_path / "expected"))


@pytest.mark.parametrize("packing", PACKERS)
def test_a_stream_that_is_cut_anywhere_is_never_a_shorter_file(packing: str, tmp_path: Path) -> None:
    """Also inside the second member, where the readers of the standard library stop without a word."""
    first, second = (b"".join(json.dumps({"prompt": f"{name} {row}"}).encode() + b"\n" for row in range(9)) for name in "ab")
    packed = PACKERS[packing](first) + PACKERS[packing](second)
    whole_at = len(PACKERS[packing](first))
    for size in range(1, len(packed)):
        (tmp_path / "cut").write_bytes(packed[:size])
        if size == whole_at:
            assert ingested(tmp_path / "cut", tmp_path / "out").record.rows == 9
            continue
        with pytest.raises(PromptError) as caught:
            ingested(tmp_path / "cut", tmp_path / "out")
        assert caught.value.hint


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_damage_to_any_byte_is_an_error_or_nothing(packing: str, tmp_path: Path) -> None:
    """These formats have checksums: what is read is the file, or an error."""
    content = b"".join(json.dumps({"prompt": f"text {row}"}).encode() + b"\n" for row in range(9))
    packed = PACKERS[packing](content)
    (tmp_path / "whole").write_bytes(packed)
    expected = ingested(tmp_path / "whole", tmp_path / "expected")
    for at in range(len(packed)):
        (tmp_path / "bad").write_bytes(packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :])
        try:
            same(ingested(tmp_path / "bad", tmp_path / "out"), expected)
        except PromptError as error:
            assert error.hint  # noqa: PT017


@pytest.mark.parametrize("packing", PACKERS)
def test_what_follows_a_compressed_file_is_not_ignored(packing: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(PACKERS[packing](b'{"prompt": "a"}\n') + b'{"prompt": "b"}\n')
    with pytest.raises(PromptError, match=r"reading prompts .* failed"):
        ingested(tmp_path / "p", tmp_path / "out")


def test_xz_may_be_padded(tmp_path: Path) -> None:
    content = [lzma.compress(json.dumps({"prompt": name}).encode() + b"\n") for name in "ab"]
    (tmp_path / "p").write_bytes(content[0] + bytes(300_000) + content[1] + bytes(4))
    assert ingested(tmp_path / "p", tmp_path / "out").texts == ["a", "b"]


def test_what_was_compressed_twice_is_unpacked_twice(lines: Path, tmp_path: Path) -> None:
    content = lines.read_bytes()
    (tmp_path / "twice").write_bytes(gzip.compress(zstd(content)))
    same(ingested(tmp_path / "twice", tmp_path / "found"), ingested(lines, tmp_path / "expected"))
    for _ in range(5):
        content = gzip.compress(content)
    (tmp_path / "often").write_bytes(content)
    with pytest.raises(PromptError, match="compressed 3 times and more"):
        ingested(tmp_path / "often", tmp_path / "out")


def test_zstandard_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.zst").write_bytes(zstd(b'{"prompt": "a"}\n'))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PromptError, match="is a Zstandard stream; reading it needs pyarrow") as caught:
        ingested(tmp_path / "p.zst", tmp_path / "out")
    assert "embstore[parquet]" in str(caught.value.hint)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("packing", PACKERS)
def test_a_bomb_of_one_line_takes_no_more_memory_than_a_line_may(packing: str, tmp_path: Path) -> None:
    """256 MiB without a line break in a few kilobytes is one line that is too long; what follows it is read."""
    path = tmp_path / "bomb"
    block = b"x" * (32 << 20)
    end = b'\n{"prompt": "after it"}\n'
    if packing == "gz":
        packer = zlib.compressobj(wbits=31)
        path.write_bytes(b"".join([*(packer.compress(block) for _ in range(8)), packer.compress(end), packer.flush()]))
    else:
        path.write_bytes(PACKERS[packing](block) * 8 + PACKERS[packing](end))
    code = """
import sys
from embstore.core.config import USUAL_FIELDS
from embstore.host.memory import MemoryMeter
from embstore.storage.prompt_source import open_source
import pyarrow
with MemoryMeter() as meter:
    meter.set_baseline()
    with open_source(sys.argv[1], USUAL_FIELDS) as prompts:
        print([getattr(prompt, "text", None) for prompt in prompts], meter.peak_anonymous_bytes, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True)
    texts, peak = done.stdout.splitlines()
    assert texts == "[None, 'after it']"
    assert int(peak) < 300 << 20


# --- chunk boundaries --------------------------------------------------------------------------------------------------

_TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(str.strip)


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A file in one of the formats that are told apart by content, and the texts it holds."""
    texts = draw(st.lists(_TEXTS, min_size=1, max_size=6))
    records = [{"prompt": text} for text in texts]
    is_ascii = draw(st.booleans())
    kind = draw(st.sampled_from(["lines", "array", "indented array", "indented objects", "bom"]))
    if kind == "array":
        content = json.dumps(records, ensure_ascii=is_ascii)
    elif kind == "indented array":
        content = draw(st.sampled_from(["", "\n", " \r\n"])) + json.dumps(records, ensure_ascii=is_ascii, indent=2) + "\n"
    elif kind == "indented objects":
        content = "\n".join(json.dumps(record, ensure_ascii=is_ascii, indent=1) for record in records)
    else:
        content = "".join(json.dumps(record, ensure_ascii=is_ascii) + "\n" for record in records)
    data = ("\ufeff" if kind == "bom" else "").encode() + content.encode()
    return ALL[draw(st.sampled_from(sorted(ALL)))](data), texts


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(file=files(), pieces=st.lists(st.integers(1, 9), max_size=30), step=st.integers(1, 50))
def test_what_a_file_is_does_not_depend_on_how_it_arrives(
    file: tuple[bytes, list[str]], pieces: list[int], step: int
) -> None:
    content, texts = file
    with pipe(content, [*pieces, step]) as source, open_source(source, USUAL_FIELDS) as prompts:
        assert [prompt.text for prompt in prompts if isinstance(prompt, Prompt)] == texts


def test_a_stand_in_for_standard_input_is_read_from_its_first_byte(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"]}), sink)
    for content in (b'{"prompt": "a"}\n{"prompt": "b"}\n', sink.getvalue()):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert ingested("-", tmp_path / str(len(content))).texts == ["a", "b"]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(PromptError, match="standard input is closed"):
        ingested("-", tmp_path / "none")


@pytest.mark.parametrize("packing", ["plain", "gz"])
def test_standard_input_that_does_not_block_is_waited_for(
    packing: str, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell or a parent process may have set the pipe so: a read gives nothing where nothing has come yet."""
    content = ALL[packing](lines.read_bytes())
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    waits: list[int] = []

    def wait(readers: list[Any], *others: object) -> None:
        """Each time that nothing is there, a part more comes, and at last the end."""
        assert [each.fileno() for each in readers] == [reading]
        at = len(waits) * 700
        if at < len(content):
            os.write(writing, content[at : at + 700])
        else:
            os.close(writing)
        waits.append(at)

    with os.fdopen(reading, "rb") as pipe_end:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(pipe_end))
        monkeypatch.setattr("select.select", wait)
        found = ingested("-", tmp_path / "found")
    same(found, ingested(lines, tmp_path / "expected"))
    assert len(waits) == -(-len(content) // 700) + 1


def test_a_store_is_the_same_bytes_from_lines_a_table_and_a_pipe(lines: Path, tmp_path: Path) -> None:
    good = [json.loads(line) for line in lines.read_bytes().splitlines() if line.startswith(b"{")]
    names = {name: None for line in good for name in line}
    plain = write_lines(tmp_path / "good.jsonl", good)
    pq.write_table(pa.Table.from_pylist([{**names, **line} for line in good]), tmp_path / "good.parquet")
    build_small(plain, tmp_path / "a")
    build_small(tmp_path / "good.parquet", tmp_path / "b")
    with pipe(gzip.compress(plain.read_bytes()), [1, 2]) as source:
        build_small(Path(source), tmp_path / "c")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") == snapshot(tmp_path / "c")
