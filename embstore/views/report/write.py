"""A report as a file: the page for people, the picture for a README or a paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embstore.core.errors import ConfigError, StoreExistsError
from embstore.storage.atomic import write_durable
from embstore.views.report.data import read_report
from embstore.views.report.page import render_page
from embstore.views.report.plots import render_picture

_PAGE_START = b"<!doctype html>"
_PICTURE_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenReport:
    """A written file and its size."""

    path: str
    bytes: int


def write_report(
    path: str | Path,
    *,
    html: str | Path | None = None,
    png: str | Path | None = None,
    by: str | None = None,
    name: str = "default",
) -> list[WrittenReport]:
    """Write a report of a finished store; an existing report is replaced, any other file is refused.

    Parameters
    ----------
    path
        The store's folder.
    html
        One self-contained page; needs the ``report`` extra.
    png
        The summary plots as one picture; needs the ``report`` extra.
    by
        The field of the input lines that tells a prompt's source; by default ``src``, ``source``, ``dataset`` or the like.
    name
        Which weighting.

    Raises
    ------
    ConfigError
        The extra is not installed, or a file would lie inside the store.
    StoreExistsError
        Another file has this name.
    StoreNotFoundError, IncompleteStoreError, CorruptStoreError, StorageError
        As for ``open_store``, or the file system refused.
    """
    wanted = [(Path(file), start) for file, start in ((html, _PAGE_START), (png, _PICTURE_START)) if file is not None]
    for file, start in wanted:
        _refuse(Path(path), file, start)
    data = read_report(path, by=by, name=name)
    contents = []
    if html is not None:
        contents.append(render_page(data).encode())
    if png is not None:
        contents.append(render_picture(data))
    for (file, _), content in zip(wanted, contents, strict=True):
        write_durable(file, content)
    return [WrittenReport(path=str(file), bytes=len(content)) for (file, _), content in zip(wanted, contents, strict=True)]


def _refuse(store: Path, file: Path, start: bytes) -> None:
    if file.resolve().is_relative_to(store.resolve()):
        raise ConfigError(f"{file} lies inside the store {store}", hint="write it outside the store")
    if file.is_dir():
        raise StoreExistsError(f"{file} is a folder", hint="name a file")
    if file.exists():
        with file.open("rb") as handle:
            if handle.read(len(start)) != start:
                raise StoreExistsError(f"{file} exists and is not a report", hint="choose another file name")
