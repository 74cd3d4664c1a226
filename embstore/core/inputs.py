"""One handle per input: opened once, never sought, looked at without losing a byte, unpacked where it is compressed.

A pipe can be read once. So whoever asks what an input is (``core.file_kinds``) asks this handle, and reads on from it. What
needs to be read from both ends (Parquet) is mapped if it is a file, and copied to a scratch file first if it is not.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import mmap
import os
import select
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from embstore.core.config import format_bytes
from embstore.core.errors import PromptError
from embstore.core.file_kinds import BZIP2, GZIP, HEAD_BYTES, XZ, FileKind, kind_of
from embstore.core.files import storage_errors

INSTALL_PARQUET = "pip install 'embstore[parquet]'"
# of a table that comes through a pipe or is compressed as a whole
MAX_SPOOL_BYTES = 64 << 30
_READ_BYTES = 1 << 18
_LAYERS = 3  # a .jsonl.gz that a server compressed again has two
_XZ_MEMORY = 256 << 20  # xz -9 asks for 65 MiB


class Input:
    """An open input. Reading ``stream`` begins at the first byte, in spite of what ``head`` shows of it already.

    ``kind`` is what the unpacked content is, None for text; ``is_packed`` says whether it was compressed.
    """

    def __init__(self, source: BinaryIO, name: str) -> None:
        self.name = name
        self._handle = _regular_file(source)
        self.is_packed = False
        self._place(source)
        layers = 0
        while self.kind is not None and self.kind.codec:
            if layers == _LAYERS:
                raise PromptError(f"{name} is compressed {layers} times and more", hint="unpack it first")
            self._place(_unpacked(self.kind, self.stream, name))
            self.is_packed = True
            layers += 1

    def _place(self, stream: BinaryIO) -> None:
        raw = _Stream(stream, self.name)
        self.head = raw.look(HEAD_BYTES)
        self.stream = io.BufferedReader(raw, _READ_BYTES)
        self.kind: FileKind | None = kind_of(self.head)

    @contextlib.contextmanager
    def mapped(self, scratch: Path | None) -> Iterator[mmap.mmap]:
        """All bytes, mapped: of the file itself, or of a copy in ``scratch`` of what came through a pipe or compressed.

        Raises
        ------
        PromptError
            The copy would have more than ``MAX_SPOOL_BYTES``.
        """
        if not self.is_packed and self._handle is not None:
            yield mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)
            return
        folder = scratch or Path(tempfile.gettempdir())
        with contextlib.ExitStack() as closing:
            with storage_errors("writing to", folder):
                copy = closing.enter_context(tempfile.TemporaryFile(dir=folder))
                self._spool(copy)
            yield mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)

    def _spool(self, copy: BinaryIO) -> None:
        size = 0
        while block := self.stream.read(_READ_BYTES):
            size += len(block)
            if size > MAX_SPOOL_BYTES:
                raise PromptError(
                    f"{self.name} has more than {format_bytes(MAX_SPOOL_BYTES)}, and is read from both ends",
                    hint="write it to an uncompressed file, and give that file",
                )
            copy.write(block)
        copy.flush()


def check_input(source: str | Path) -> None:
    """Refuse what is not there or cannot be opened; a pipe is not touched, because its bytes come only once.

    Raises
    ------
    PromptError
    """
    if str(source) == "-":
        return
    with _readable(source):
        if stat.S_ISREG(Path(source).stat().st_mode):
            Path(source).open("rb").close()


@contextlib.contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise PromptError(
            f"cannot read prompts {source}: {reason}", hint="give a JSONL or Parquet file, one prompt per line"
        ) from error


@contextlib.contextmanager
def open_input(source: str | Path) -> Iterator[Input]:
    """Open a file, a pipe, or standard input (``-``); the one place where that is done.

    Raises
    ------
    PromptError
        It is missing, unreadable or damaged.
    """
    with contextlib.ExitStack() as closing:
        if str(source) == "-":
            if sys.stdin is None:
                raise PromptError("cannot read prompts -: standard input is closed", hint="give a file, or a pipe")
            yield Input(sys.stdin.buffer, "-")
            return
        with _readable(source):
            file = closing.enter_context(Path(source).open("rb", buffering=0))
        yield Input(file, str(source))


class _Stream(io.RawIOBase):
    """Bytes of a stream, those first that were looked at. Whatever fails in it is a PromptError that names the input."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        super().__init__()
        self._stream = stream
        self._name = name
        self._seen = b""

    def look(self, count: int) -> bytes:
        """The first ``count`` bytes, or all there are: a pipe may deliver them one by one."""
        while len(self._seen) < count and (more := self._next(count - len(self._seen))):
            self._seen += more
        return self._seen

    def readable(self) -> bool:
        """Bytes can be read, and nothing else."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer
        """Fill the buffer, or a part of it; 0 at the end."""
        data = self._seen[: len(buffer)] or self._next(len(buffer))
        self._seen = self._seen[len(data) :]
        buffer[: len(data)] = data
        return len(data)

    def _next(self, count: int) -> bytes:
        try:
            data: bytes | None = self._stream.read(count)
            while data is None:  # a descriptor that does not block, and nothing has come yet
                select.select([self._stream], [], [])
                data = self._stream.read(count)
            return data
        except PromptError:
            raise
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise PromptError(
                f"reading prompts {self._name} failed: {error}", hint="the file is damaged or truncated"
            ) from error


class _Members:
    """The unpacked bytes of all members of a bzip2 or xz file, one after the other.

    The readers of the standard library stop silently where another member should begin and does not.
    """

    def __init__(self, stream: BinaryIO, kind: FileKind) -> None:
        self._stream = stream
        self._is_xz = kind is XZ
        self._member = self._begin()

    def _begin(self) -> Any:  # noqa: ANN401 - the two decompressors share their methods, but no class
        if self._is_xz:
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        return bz2.BZ2Decompressor()

    def read(self, count: int) -> bytes:
        """At least one byte and at most ``count``; none at the end."""
        while True:
            if self._member.eof:
                rest = self._member.unused_data or self._stream.read(_READ_BYTES)
                while self._is_xz and rest and not rest.lstrip(b"\0"):  # padding between members
                    rest = self._stream.read(_READ_BYTES)
                if not rest:
                    return b""
                self._member = self._begin()
                data = self._member.decompress(rest.lstrip(b"\0") if self._is_xz else rest, count)
            else:
                block = self._stream.read(_READ_BYTES) if self._member.needs_input else b""
                if self._member.needs_input and not block:
                    raise EOFError("the compressed stream ends before its end marker")
                data = self._member.decompress(block, count)
            if data:
                return bytes(data)


def _unpacked(kind: FileKind, stream: BinaryIO, name: str) -> BinaryIO:
    if kind is GZIP:
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if kind in (BZIP2, XZ):
        return _Members(stream, kind)  # type: ignore[return-value]
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra; the standard library has no Zstandard before 3.14
    except ImportError:
        raise PromptError(
            f"{name} is {kind.name}; reading it needs pyarrow",
            hint=f"{INSTALL_PARQUET}, or zstd -dc FILE | embstore build - ...",
        ) from None
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")  # type: ignore[no-any-return]


def _regular_file(file: BinaryIO) -> int | None:
    """The descriptor of a file that is to be read from its first byte, None for pipes, devices and the rest of a file."""
    try:
        handle = file.fileno()
        is_whole = stat.S_ISREG(os.fstat(handle).st_mode) and file.tell() == 0
    except (OSError, ValueError):  # a stand-in for standard input
        return None
    return handle if is_whole else None
