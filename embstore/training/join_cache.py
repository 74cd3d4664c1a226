"""The rows that a join found, kept in the user's cache folder: a second start maps them.

A file is named after everything that decides its rows: the dataset's content as Arrow holds it, the store's keys, the rule
by which prompts are read, and the columns. The fingerprint of ``datasets`` is not enough: it does not cover the content, and
after ``set_seed`` different datasets can have the same one. Hashing a column takes less than a tenth of the time of a join.

The folder is ``$EMBSTORE_CACHE`` (empty: nothing is kept), or ``embstore`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Files
appear by a rename and end in a digest of their content; the oldest go when they are too many bytes together. What cannot be
read, written or locked is computed, never an error.

Shapes: M items.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import CorruptStoreError
from embstore.core.files import map_file
from embstore.training.items import BLOCK_ITEMS, has_transform, is_hugging_face, selected_rows, without_selection
from embstore.training.join import Join
from embstore.training.reading import PromptReading

try:
    import fcntl
except ImportError:  # Windows: every process computes for itself
    fcntl = None  # type: ignore[assignment]

FOLDER_VARIABLE = "EMBSTORE_CACHE"
_VERSION = b"embstore join 1\0"
_MOST_BYTES = 2 << 30
_DIGEST_WORDS = 4  # of 8 bytes: a sha256
_LONGEST_WAIT = 300.0  # seconds for another process that computes the same rows
_WAIT = 0.05
_FORMS: tuple[Literal["", "text", "chat"], ...] = ("", "text", "chat")


def kept(name: str | None, compute: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
    """The vector int64 that ``compute`` makes, from the file ``name`` if there is a sound one, else made and kept.

    Of several processes that ask at once, one computes and the others wait for its file, a few minutes at most.
    """
    folder = _folder() if name is not None else None
    if name is None or folder is None:
        return compute()
    path = folder / f"{name}.npy"
    found = _read(path)
    if found is not None:
        return found
    with _turn(folder, name) as is_ours:
        found = _read(path)  # made while we waited
        if found is not None:
            return found
        made = compute()
        if is_ours:
            _write(path, made)
        return made


def kept_join(
    dataset: object, reading: PromptReading, *, keys: str, num_rows: int, explains: bool, compute: Callable[[], Join]
) -> Join:
    """The join that ``compute`` makes, or its rows from the cache.

    Parameters
    ----------
    keys, num_rows
        sha256 of the store's row keys, and their number.
    explains
        Whether missing items must be explained: then a join that lacks some is made again.
    """
    made: list[Join] = []

    def words() -> NDArray[np.int64]:
        made.append(compute())
        return np.append(made[0].rows_M, _FORMS.index(made[0].form) + len(_FORMS) * made[0].has_answers)

    name = _name(dataset, reading, f"{keys} {reading}")
    rows_and_flags = kept(name, words)
    if made:
        return made[0]
    rows_M, flags = rows_and_flags[:-1], rows_and_flags[-1:]
    num_items = len(dataset)  # type: ignore[arg-type]  # only what has a length is kept
    lowest, highest = rows_M.min(initial=num_rows), rows_M.max(initial=-1)
    is_sound = len(rows_M) == num_items and lowest >= -1 and highest < num_rows and 0 <= flags[0] < 2 * len(_FORMS)
    must_be_explained = lowest < 0 and (explains or highest < 0)  # no policy takes a dataset that is missing as a whole
    if not is_sound or must_be_explained:
        return compute()
    has_answers, form = divmod(int(flags[0]), len(_FORMS))
    return Join(rows_M=rows_M, form=_FORMS[form], has_answers=bool(has_answers))


def _name(dataset: Any, reading: PromptReading, identity: str) -> str | None:  # noqa: ANN401 - anything
    """A name for what is found for this content: sha256 over the columns' Arrow data, the selected rows and ``identity``.

    None for what is not a ``datasets.Dataset``, makes its items when they are read, or selects few rows of much data.
    """
    if not hasattr(dataset, "_fingerprint") or not is_hugging_face(dataset) or has_transform(dataset):
        return None
    selected = dataset.select_columns(reading.choose(dataset.column_names)).with_format("arrow")
    rows_M = selected_rows(selected)
    if rows_M is not None:
        selected = without_selection(selected)
    elif getattr(selected, "_indices", None) is not None:
        return None
    digest = hashlib.sha256(_VERSION + identity.encode())
    try:
        for table in selected.iter(batch_size=BLOCK_ITEMS):
            if "dictionary<" in str(table.schema):
                return None  # a batch is serialised without its dictionaries
            digest.update(table.schema.remove_metadata().serialize())
            for batch in table.to_batches():
                digest.update(batch.serialize())
    except NotImplementedError:  # a type that Arrow does not serialise
        return None
    digest.update(b"all" if rows_M is None else rows_M.tobytes())
    return digest.hexdigest()


def _folder() -> Path | None:
    """Where joins are kept, made if it is missing; None if nothing is to be kept, or can be."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given == "":
        return None
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "embstore"
        folder = (Path(given) if given else base) / "joins"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return None
    return folder


def _seal(name: str, words: NDArray[np.int64]) -> bytes:
    """sha256 of a file's values and of its name, so that a renamed file is not taken for another."""
    return hashlib.sha256(name.encode() + b"\0" + np.ascontiguousarray(words).view(np.uint8).data).digest()


def _read(path: Path) -> NDArray[np.int64] | None:
    """A read-only map of the file's values; None if it is missing, damaged or unreadable."""
    try:
        with path.open("rb") as file:
            words = map_file(file, str(path), "<i8", (None,), hint="remove it")
        if len(words) < _DIGEST_WORDS or words[-_DIGEST_WORDS:].tobytes() != _seal(path.stem, words[:-_DIGEST_WORDS]):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the oldest files go first
    except (OSError, CorruptStoreError):
        return None
    values: NDArray[np.int64] = words[:-_DIGEST_WORDS]
    return values


def _write(path: Path, values: NDArray[np.int64]) -> None:
    unfinished = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp")
    sealed = np.concatenate([values.astype("<i8"), np.frombuffer(_seal(path.stem, values), "<i8")])
    try:
        with unfinished.open("xb") as file:
            np.save(file, sealed)
        unfinished.replace(path)
        _make_room(path.parent, spare=path)
    except OSError:
        pass  # a full or read-only disk: the rows are there all the same
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _make_room(folder: Path, *, spare: Path) -> None:
    """Remove the files that were not used for longest, and what killed processes left, until the rest is small enough."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process removed it
            status = path.stat()
            if path.suffix == ".npy" or (path.suffix == ".tmp" and time.time() - status.st_mtime > 3600):
                files.append((path.suffix != ".tmp", status.st_mtime, status.st_size, path))
    total = sum(size for _, _, size, _ in files)
    for is_result, _, size, path in sorted(files):
        if path == spare or (is_result and total <= _MOST_BYTES):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size


@contextlib.contextmanager
def _turn(folder: Path, name: str) -> Iterator[bool]:
    """Hold the lock of a result while computing it; yields whether it is held.

    It is not where locks do not work, or another process held it for minutes. There are 16 lock files for all results, so
    none need be removed.
    """
    handle = None
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                handle = os.open(folder / f"{name[0]}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        yield handle is None or _lock(handle)
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int) -> bool:
    deadline = time.monotonic() + _LONGEST_WAIT
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_WAIT)
        except OSError:  # a file system without locks: the rename alone keeps the file whole
            return True
        else:
            return True
