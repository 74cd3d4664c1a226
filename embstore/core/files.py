"""Reading the files of a store: regular files only, of bounded size, never through a link, never unpickled.

``storage`` and the numpy-only ``training`` share these readers; whatever writes, syncs, renames or locks is in
``storage.atomic``. A store may come from a stranger, so nothing is allocated that the disk does not back. An error of the
operating system that says nothing about the bytes (no descriptors, no permission) is a StorageError, never damage.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import HEADER_BYTES, decode_array_header
from embstore.core.errors import CorruptStoreError, EmbstoreError, ExitCode, StorageError
from embstore.core.format import DOCUMENT_BYTES, FileDigest

Buffer = bytes | bytearray | memoryview
TEMP_NAME = re.compile(r"\..+\.([0-9a-f]{8}|\d+)\.tmp")  # digits alone: of older versions

_READ_BYTES = 8 << 20
# what network and FUSE file systems answer that cannot sync a folder
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
# links are not followed, FIFOs not waited for, children started by exec do not inherit; Windows has only the last flag
_OPEN_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
# errors of open for links (with O_NOFOLLOW), folders (for writing), sockets and FIFOs, and files in place of folders
_IRREGULAR = (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO, errno.ENOTDIR)
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_WRONG_PLACE = (*_NOT_ALLOWED, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_TAKEN = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP)
_AGAIN = "then run the command again"


@contextlib.contextmanager
def storage_errors(doing: str, path: Path, *, opening: bool = False) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the operation, the path, and the next step.

    ``opening``: the store is not open yet, so a place that cannot be written is a wrong --out, not an unfinished build.
    """
    try:
        yield
    except EmbstoreError:  # some are OSErrors too, and say more than their errno
        raise
    except OSError as error:
        if isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(path):
            path = Path(error.filename)  # a file below the folder that is being worked on
        failure = StorageError(
            f"{doing} {path} failed: {error.strerror or error}", hint=_next_step(doing, path, error.errno, opening=opening)
        )
        failure.errno = error.errno
        if opening and error.errno in _WRONG_PLACE:
            failure.exit_code = ExitCode.ERROR
        raise failure from error


def _next_step(doing: str, path: Path, code: int | None, *, opening: bool) -> str:  # noqa: PLR0911 - one return per kind
    if code in _FULL:
        return f"free some space, {_AGAIN}"
    if code in _TOO_MANY_OPEN:
        return f"close some files or raise the limit (ulimit -n), {_AGAIN}"
    if code == errno.ENOMEM:
        return f"free some memory, {_AGAIN}"
    if code in _NOT_ALLOWED and doing == "reading":
        return f"make the file readable, {_AGAIN}"
    if code in _NOT_ALLOWED and doing == "creating":  # also files that are not of a store
        return f"make the folder {path.parent} writable, or choose another place"
    if code in _NOT_ALLOWED or (opening and code in _WRONG_PLACE):
        return "make the folder writable, or choose another --out"
    if code == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if code in _TAKEN and doing != "reading":
        return "something else has this name: remove it, or choose another name"
    if code == errno.ENOENT or code in _TAKEN:
        missing = next((folder for folder in reversed(path.parents) if not folder.exists()), None)
        return f"create the folder {missing}, {_AGAIN}" if missing is not None else f"check the path, {_AGAIN}"
    return f"fix the file system, {_AGAIN}"


def temp_path(path: Path, folder: Path | None = None) -> Path:
    """Where a file is written before it gets the name ``path``: in ``folder``, or in that of ``path``.

    No two calls give the same name. Process ids would: in a container every process may have the pid 1, and what a killed
    one left would be in the way of the next.
    """
    return (folder or path.parent) / f".{path.name}.{secrets.token_hex(4)}.tmp"


def fsync_directory(path: Path) -> bool:
    """Make renames and new names in ``path`` durable; False where the file system cannot do that for any folder."""
    with storage_errors("syncing folder", path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
            return False
        finally:
            os.close(handle)
    return True


def open_regular(root: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """Descriptor of the file ``name`` of a store; no link is followed and no FIFO waited for.

    Raises
    ------
    CorruptStoreError
        It is not a regular file, or is reached through a link: whoever made the store could have pointed it anywhere.
    """
    folders = Path(name).parents[:-1]  # without "."
    linked = next((folder for folder in folders if (root / folder).is_symlink()), None)
    if linked is not None:
        raise irregular(linked.as_posix())
    try:
        handle = os.open(root / name, flags | _OPEN_FLAGS, 0o666)
    except OSError as error:
        if error.errno in _IRREGULAR:
            raise irregular(name) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise irregular(name)
    return handle


def irregular(name: str) -> CorruptStoreError:
    """The error for a link, device or folder in place of a file that a store owns."""
    return CorruptStoreError(
        f"{name} is a link or not a regular file; all files and folders of a store must be inside it",
        hint="if you moved it to another disk, move it back or mount the disk there",
    )


def reading_problem(root: Path, name: str, error: OSError) -> str:
    """What a failed read tells about the file: it is missing, or the disk cannot read it.

    Raises
    ------
    StorageError
        The error says nothing about the file: no descriptors or memory left, no permission. That is not damage.
    """
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if error.errno == errno.EIO:
        return f"cannot be read ({os.strerror(errno.EIO)})"
    with storage_errors("reading", root / name):
        raise error


def file_size(root: Path, name: str) -> int | None:
    """Bytes of the file ``name`` of a store, None if it is missing; anything but a regular file is a CorruptStoreError."""
    with storage_errors("reading", root / name):
        try:
            handle = open_regular(root, name)
        except FileNotFoundError:
            return None
        size = os.fstat(handle).st_size
        os.close(handle)
        return size


def read_blocks(root: Path, name: str) -> Iterator[bytes]:
    """The file ``name`` of a store, a few MiB at a time."""
    handle = open_regular(root, name)
    try:
        yield from _blocks(handle)
    finally:
        os.close(handle)


def read_all(handle: int, name: str, limit: int) -> bytes:
    """Every byte of an open file; a file larger than ``limit`` is a CorruptStoreError and is not read."""
    size = os.fstat(handle).st_size
    if size > limit:
        raise CorruptStoreError(f"{name} has {size} bytes, more than the limit of {limit}", hint="is this a store?")
    return pread_all(handle, size, 0)


def pread_all(handle: int, size: int, offset: int) -> bytes:
    """``size`` bytes from ``offset``, fewer where the file ends; one call of the kernel returns at most 2 GiB."""
    blocks = []
    while size and (block := _read_at(handle, min(_READ_BYTES, size), offset)):
        blocks.append(block)
        size, offset = size - len(block), offset + len(block)
    return b"".join(blocks)


def read_if_present(root: Path, name: str, *, limit: int | None = DOCUMENT_BYTES) -> bytes | None:
    """Bytes of a JSON file of a store, None if it is missing; a file larger than ``limit`` is a CorruptStoreError.

    ``limit`` None is for files that grow with the rows: they are read up to the first zero byte, which JSON never contains
    and every hole of a sparse file returns.
    """
    with storage_errors("reading", root / name):
        try:
            if limit is None:
                return b"".join(_text_blocks(root, name))
            handle = open_regular(root, name)
            try:
                return read_all(handle, name, limit)
            finally:
                os.close(handle)
        except FileNotFoundError:
            return None


def read_committed(root: Path, name: str, *, limit: int | None = DOCUMENT_BYTES) -> bytes:
    """As ``read_if_present``, for a file that a commit promised: if it is missing, that is damage (CorruptStoreError)."""
    content = read_if_present(root, name, limit=limit)
    if content is None:
        raise CorruptStoreError(f"{name} is missing", hint=f"run embstore verify {root}")
    return content


def committed_blocks(root: Path, name: str) -> Iterator[bytes]:
    """As ``read_blocks``, for a file that a commit promised: if it is missing, that is damage (CorruptStoreError)."""
    with storage_errors("reading", root / name):
        try:
            yield from read_blocks(root, name)
        except FileNotFoundError:
            raise CorruptStoreError(f"{name} is missing", hint=f"run embstore verify {root}") from None


def digest_problem(pieces: Iterable[Buffer], digest: FileDigest) -> str | None:
    """How bytes differ from the digest that was made when they were written, or None."""
    total, size = hashlib.sha256(), 0
    for piece in pieces:
        total.update(piece)
        size += memoryview(piece).nbytes
    if size != digest.bytes:
        return f"has {size} bytes, but {digest.bytes} were committed"
    found = total.hexdigest()
    if found == digest.sha256:
        return None
    width = 16 if found[:16] != digest.sha256[:16] else len(found)  # the digest itself may be what was damaged
    return f"has sha256 {found[:width]}, but committed was {digest.sha256[:width]}"


def file_problem(
    root: Path, name: str, digest: FileDigest, *, seen: Callable[[bytes], object] = lambda block: None
) -> str | None:
    """How a file of a store differs from its digest, or None; it is read once, or not at all if its size differs.

    ``seen`` is called with each block that was read, in order.

    Raises
    ------
    StorageError
        See ``reading_problem``.
    """
    try:
        handle = open_regular(root, name)
        try:
            size = os.fstat(handle).st_size
            if size != digest.bytes:
                return f"has {size} bytes, but {digest.bytes} were committed"
            return digest_problem(_shown_to(seen, _blocks(handle)), digest)
        finally:
            os.close(handle)
    except CorruptStoreError as error:
        return str(error)
    except OSError as error:
        return reading_problem(root, name, error)


def check_content(root: Path, name: str, pieces: Iterable[Buffer], digest: FileDigest) -> None:
    """Compare the bytes of the file ``name`` with its digest; a difference is a CorruptStoreError."""
    problem = digest_problem(pieces, digest)
    if problem is not None:
        raise CorruptStoreError(f"{name} {problem}", hint=f"run embstore verify {root}")


def check_array(root: Path, name: str, array: NDArray[Any], digest: FileDigest) -> None:
    """Compare a mapped array with the digest of its file; a difference is a CorruptStoreError. Price: one read of it."""
    # the header follows from dtype and shape: a writer never writes another one
    header = array_header(array.dtype, array.shape)
    check_content(root, name, (header, array.reshape(-1).view(np.uint8).data), digest)


def array_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The .npy header of a C-ordered array."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return header.getvalue()


def map_array(
    root: Path,
    name: str,
    dtype: str | None = None,
    shape: tuple[int | None, ...] | None = None,
    *,
    mode: Literal["r", "c"] = "r",
) -> NDArray[Any]:
    """Memory map of a ``.npy`` file of a store, once its header and size are what ``dtype`` and ``shape`` ask for.

    ``dtype`` and ``shape`` None take any array; None in ``shape`` takes any length. ``mode`` "c" is copy-on-write, "r"
    read-only.

    Raises
    ------
    CorruptStoreError
        The file is missing, not a regular file, or another array.
    """
    hint = f"run embstore verify {root}"
    with storage_errors("reading", root / name):
        try:
            handle = open_regular(root, name)
        except FileNotFoundError:
            raise CorruptStoreError(f"{name} is missing", hint=hint) from None
        with os.fdopen(handle, "rb") as file:
            return map_file(file, name, dtype, shape, mode=mode, hint=hint)


def map_file(
    file: BinaryIO,
    name: str,
    dtype: str | None = None,
    shape: tuple[int | None, ...] | None = None,
    *,
    mode: Literal["r", "c"] = "r",
    hint: str,
) -> NDArray[Any]:
    """As ``map_array``, of an open file: the file that was checked is mapped, even if a writer replaces its name meanwhile.

    The header is not read by numpy, which would evaluate it as Python.
    """
    header = decode_array_header(file.read(HEADER_BYTES), name=name)
    size = os.fstat(file.fileno()).st_size
    is_other = dtype is not None and header.descr != dtype
    if shape is not None:
        expected = tuple(length if wanted is None else wanted for wanted, length in zip(shape, header.shape, strict=False))
        is_other |= header.shape != expected or len(header.shape) != len(shape) or header.is_fortran
    if is_other:
        raise CorruptStoreError(
            f"{name} contains {header.descr} of shape {header.shape}, expected {dtype} of shape {shape}", hint=hint
        )
    needed = header.offset + np.dtype(header.descr).itemsize * math.prod(header.shape)
    if size != needed:
        raise CorruptStoreError(f"{name} has {size} bytes, but its header describes {needed}", hint=hint)
    order: Literal["F", "C"] = "F" if header.is_fortran else "C"
    try:
        return np.memmap(file, dtype=header.descr, mode=mode, offset=header.offset, shape=header.shape, order=order)
    except (ValueError, OverflowError) as error:  # an empty array of more than numpy's dimensions or lengths
        raise CorruptStoreError(f"{name} cannot be mapped ({error})", hint=hint) from error


def _shown_to(seen: Callable[[bytes], object], blocks: Iterable[bytes]) -> Iterator[bytes]:
    for block in blocks:
        seen(block)
        yield block


def _blocks(handle: int) -> Iterator[bytes]:
    offset = 0
    while block := _read_at(handle, _READ_BYTES, offset):
        yield block
        offset += len(block)


def _text_blocks(root: Path, name: str) -> Iterator[bytes]:
    for block in read_blocks(root, name):
        if b"\0" in block:
            raise CorruptStoreError(f"{name} contains a zero byte", hint=f"run embstore verify {root}")
        yield block


def _read_at(handle: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(handle, size, offset)
    os.lseek(handle, offset, os.SEEK_SET)  # Windows
    return os.read(handle, size)
