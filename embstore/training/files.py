"""The files of a finished store as training reads them: bounded, never through a link, never unpickled. numpy only.

Shapes: N rows.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import HEADER_BYTES, decode_array_header, parse_json
from embstore.core.errors import CorruptStoreError, IncompleteStoreError, InvalidWeightsError, StoreNotFoundError
from embstore.core.format import (
    ALIASES,
    DOCUMENT_BYTES,
    JOURNAL,
    KEYS,
    MANIFEST,
    FileDigest,
    Manifest,
    parse_document,
)

_READ_BYTES = 8 << 20


def read_manifest(root: Path) -> bytes:
    """The manifest's bytes; without one the store is unfinished, or none."""
    try:
        refuse_irregular(root, MANIFEST)
        return read_document(root / MANIFEST)
    except FileNotFoundError:
        if (root / JOURNAL).exists():
            raise IncompleteStoreError(
                f"{root} is not finished: no weights are published", hint=f"run embstore build --resume --out {root}"
            ) from None
        raise StoreNotFoundError(
            f"{root} holds no store", hint="run embstore build PROMPTS --model MODEL --out STORE"
        ) from None
    except OSError as error:
        raise unreadable(root / MANIFEST, error) from error


def read_metadata(root: Path, sidecar: str, manifest: Manifest) -> Mapping[str, object]:
    """What is known about one weighting, compared with its published digest."""
    refuse_irregular(root, sidecar)
    try:
        content = read_document(root / sidecar)
    except OSError as error:
        raise unreadable(root / sidecar, error) from error
    if hashlib.sha256(content).hexdigest() != manifest.files[sidecar].sha256:
        raise CorruptStoreError(f"{root / sidecar} is not what was published", hint=f"run embstore verify {root}")
    return parse_document(content, name=sidecar)


def refuse_irregular(root: Path, name: str) -> None:
    """A store may be anybody's: a link could lead anywhere, and a FIFO or device in place of a file never ends."""
    file = root / name
    is_linked = file.parent != root and file.parent.is_symlink()
    if is_linked or (os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode)):
        raise CorruptStoreError(
            f"{file} is a link or no regular file; a store holds its files and folders itself",
            hint=f"run embstore verify {root}",
        )


def read_document(path: Path) -> bytes:
    """A small JSON file whole; one that is larger than any store's is refused."""
    with path.open("rb") as file:
        content = file.read(DOCUMENT_BYTES + 1)
    if len(content) > DOCUMENT_BYTES:
        raise CorruptStoreError(f"{path} has more than {DOCUMENT_BYTES} bytes", hint="is this a store?")
    return content


def unreadable(path: Path, error: OSError) -> CorruptStoreError:
    """What the operating system said of a listed file, as damage."""
    return CorruptStoreError(f"{path} cannot be read ({error.strerror})", hint="run embstore verify STORE")


def map_array(file: Path) -> NDArray[Any]:
    """Read-only memory map of a plain ``.npy`` array; its header is compared with the file's size, nothing is unpickled."""
    try:
        with file.open("rb") as opened:
            size, start = os.fstat(opened.fileno()).st_size, opened.read(HEADER_BYTES)
        header = decode_array_header(start, name=str(file))
        dtype = np.dtype(header.descr)
        if (needed := header.offset + dtype.itemsize * math.prod(header.shape)) > size:
            raise ValueError(f"it has {size} bytes, its header asks for {needed}")
        order: Literal["F", "C"] = "F" if header.is_fortran else "C"
        return np.memmap(file, dtype=dtype, mode="r", offset=header.offset, shape=header.shape, order=order)
    except (OSError, ValueError, OverflowError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CorruptStoreError(f"{file} cannot be mapped ({reason})", hint="run embstore verify STORE") from error


def check_digest(file: Path, digest: FileDigest) -> None:
    """Refuse a file whose size or sha256 is not the published one."""
    total = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            if (size := os.fstat(opened.fileno()).st_size) != digest.bytes:
                raise CorruptStoreError(
                    f"{file} has {size} bytes, published were {digest.bytes}", hint="run embstore verify STORE"
                )
            while block := opened.read(_READ_BYTES):
                total.update(block)
    except OSError as error:
        raise unreadable(file, error) from error
    if (found := total.hexdigest()) != digest.sha256:
        raise CorruptStoreError(
            f"{file} has sha256 {found[:16]}, published was {digest.sha256[:16]}", hint="run embstore verify STORE"
        )


def check_vector(name: str, array: NDArray[np.floating]) -> float:
    """Refuse what cannot be sampled from; returns the float64 sum."""
    if array.ndim != 1 or not len(array):
        raise InvalidWeightsError(f"{name}: weights must be a non-empty vector, got shape {array.shape}")
    with np.errstate(invalid="ignore"):
        is_sound = array.min() >= 0 and np.isfinite(array.max())  # NaN is never >= 0; no copy is made
    if not is_sound:
        bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
        raise InvalidWeightsError(f"{name}: weight {int(bad[0])} is {array[bad[0]]}, not finite and >= 0")
    total = float(array.sum(dtype=np.float64))
    if total <= 0:
        raise InvalidWeightsError(f"{name}: the weights sum to {total}")
    return total


def sha256_of(array: NDArray[np.generic]) -> str:
    """Content of an array, its type and shape left out."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def read_keys(root: Path, manifest: Manifest, *, full: bool) -> NDArray[np.uint64]:
    """Row keys uint64 [N] in row order, a read-only map; ``full`` compares their digest."""
    refuse_irregular(root, KEYS)
    stored_N = map_array(root / KEYS)
    if stored_N.ndim != 1 or stored_N.dtype != np.uint64 or len(stored_N) != manifest.rows:
        raise CorruptStoreError(
            f"{root / KEYS} holds {stored_N.dtype} of shape {stored_N.shape}, not {manifest.rows} uint64 of one dimension",
            hint=f"run embstore verify {root}",
        )
    if full:
        check_digest(root / KEYS, manifest.files[KEYS])
    return stored_N


def read_aliases(root: Path, manifest: Manifest) -> dict[str, int]:
    """Row of every input id and every row id. Price: the whole file is parsed, about 2 us an id."""
    refuse_irregular(root, ALIASES)
    check_digest(root / ALIASES, manifest.files[ALIASES])
    try:
        value: Any = parse_json((root / ALIASES).read_bytes(), name=ALIASES)
    except OSError as error:
        raise unreadable(root / ALIASES, error) from error
    if not isinstance(value, dict) or not all(type(row) is int and 0 <= row < manifest.rows for row in value.values()):
        raise CorruptStoreError(
            f"{root / ALIASES} does not map ids to rows below {manifest.rows}", hint=f"run embstore verify {root}"
        )
    return value
