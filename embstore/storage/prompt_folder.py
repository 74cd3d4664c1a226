"""Folders of prompt files: shards, partitions, snapshots of the hub, and saved datasets. Which files, in which order.

Files are taken in the order of their paths below the folder, numbers in names by their value: part-2 comes before part-10.
A folder ``key=value`` on the way adds a field. What is hidden (``.`` or ``_`` first) or not named as data is left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from embstore.core.config import ALL_SPLITS, DatasetChoice
from embstore.core.decode import shown
from embstore.core.errors import PromptError
from embstore.core.file_kinds import DATA, PACKED, ending_of
from embstore.storage.parquet_source import STATE, saved_files, saved_splits

_SPLITS_DOCUMENT = "dataset_dict.json"
# JSON that copies of the hub have in addition to the data
_ABOUT = frozenset({"dataset_infos.json", "dataset_info.json", "state.json", "config.json", "metadata.json"})
_NUMBERED = re.compile(r"(?P<split>\w+(?:[.-]\w+)*?)-(?P<number>\d{5})-of-(?P<total>\d{5})\b")
_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "dev": "validation",
          "val": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}  # fmt: skip
# names of numbered files that do not mean a split
_PARTS = frozenset({"part", "parts", "shard", "data", "chunk", "file", "output", "batch", "prompts"})
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_MOST_NAMED = 5
# logs of tables whose folders also hold rows that were removed or replaced
_LOGS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi", "metadata/*.metadata.json": "Iceberg"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of a folder; ``columns`` are the fields that its path adds to every line."""

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)


def by_number(name: str) -> list[tuple[str, int]]:
    """Sorts names with numbers by their value, and those of equal values (1 and 01) as text.

    Examples
    --------
    >>> sorted(["part-10.npy", "part-9.npy", "other-1.npy"], key=by_number)
    ['other-1.npy', 'part-9.npy', 'part-10.npy']
    """
    return [*((text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name)), (name, 0)]


def shards(folder: Path, choice: DatasetChoice) -> list[Shard]:
    """Files of a folder, in order.

    Raises
    ------
    PromptError
        There are none, one is there twice, only a table's log says which count, or there are several splits or
        configurations and none was chosen.
    """
    if (folder / STATE).is_file():
        refuse_choice(f"{folder} is one saved dataset", split=choice.split, config=choice.config)
        return [Shard(path=path) for path in saved_files(folder)]
    if (folder / _SPLITS_DOCUMENT).is_file():
        refuse_choice(f"{folder} is a saved dataset", config=choice.config)
        return _of_saved_split(folder, choice)
    for log, kind in _LOGS.items():
        if next(folder.glob(log), None) is not None:
            raise PromptError(
                f"{folder} is a table of {kind}: its files also contain rows that were removed from it",
                hint="write the table to one Parquet file with its own library, such as "
                "pyarrow.parquet.write_table(deltalake.DeltaTable(FOLDER).to_pyarrow_table(), FILE)",
            )
    paths = list(_data_files(folder))
    if not paths:
        raise _nothing(folder)
    paths = _of_split(folder, _of_config(folder, paths, choice), choice)
    _refuse_twice(folder, paths)
    return [Shard(path=folder / path, columns=_columns(path)) for path in paths]


def missing_shards(names: Iterable[str]) -> list[str]:
    """Names of files that numbers such as ``-00000-of-00002`` promise and that are not there.

    Examples
    --------
    >>> missing_shards(["data/train-00001-of-00002.parquet", "test.jsonl"])
    ['data/train-00000-of-00002.parquet']
    """
    found: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for path in map(PurePosixPath, names):
        if match := _NUMBERED.match(path.name):
            key = str(path.parent / match["split"]), path.name[match.end() :], int(match["total"])
            found[key].add(int(match["number"]))
    return [
        f"{stem}-{number:05d}-of-{total:05d}{suffix}"
        for (stem, suffix, total), numbers in found.items()
        for number in range(total)
        if number not in numbers
    ]


def is_data_file(name: str) -> bool:
    """Whether a name has the ending of a file that holds prompts."""
    return _stem(PurePosixPath(name)) is not None


def _data_files(folder: Path) -> Iterator[PurePosixPath]:
    found = []
    for path in folder.rglob("*"):
        relative = PurePosixPath(path.relative_to(folder))
        is_hidden = any(part.startswith((".", "_")) and "=" not in part for part in relative.parts)
        if not is_hidden and is_data_file(relative.name) and relative.name not in _ABOUT and path.is_file():
            found.append(relative)
    yield from sorted(found, key=lambda path: [by_number(part) for part in path.parts])


def _stem(path: PurePosixPath) -> str | None:
    """The name without the endings of its format and compression; None if it is not the name of a data file."""
    name = path.name.lower()
    name = name.removesuffix(path.suffix.lower()) if path.suffix.lower() in PACKED else name
    ending = ending_of(name)
    return name.removesuffix(ending) if ending in DATA else None


def _refuse_twice(folder: Path, paths: Iterable[PurePosixPath]) -> None:
    """The same lines in two formats would be counted twice."""
    seen: dict[tuple[PurePosixPath, str | None], PurePosixPath] = {}
    for path in paths:
        other = seen.setdefault((path.parent, _stem(path)), path)
        if other != path:
            raise PromptError(
                f"{folder} contains {other} and {path}, which seem to be the same lines twice",
                hint="give one of the files, or move the other away",
            )


def _columns(path: PurePosixPath) -> dict[str, str]:
    pairs = (part.partition("=") for part in path.parts[:-1] if "=" in part)
    return {unquote(key): unquote(value) for key, _, value in pairs if value != _NO_PARTITION}


# --- splits and configurations ---------------------------------------------------------------------------------------


def _of_saved_split(folder: Path, choice: DatasetChoice) -> list[Shard]:
    names = choose(str(folder), "splits", saved_splits(folder / _SPLITS_DOCUMENT), "--split", choice.split)
    return [Shard(path=path) for name in names for path in saved_files(folder / name)]


def _of_config(folder: Path, paths: list[PurePosixPath], choice: DatasetChoice) -> list[PurePosixPath]:
    """Files of the chosen configuration: a separate folder, whose shards have the same names as the others'."""
    tops: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        if len(path.parts) > 1 and "=" not in path.parts[0]:
            tops[path.name].add(path.parts[0])
    several = next((found for name, found in tops.items() if _NUMBERED.match(name) and len(found) > 1), set())
    if choice.config is None and not several:
        return paths
    configs = sorted(several or set().union(*tops.values()))
    chosen = choose(str(folder), "configurations", configs, "--config", choice.config)
    return [path for path in paths if path.parts[0] in chosen]


def _of_split(folder: Path, paths: list[PurePosixPath], choice: DatasetChoice) -> list[PurePosixPath]:
    splits = {path: split_of(path) for path in paths}
    names = list(dict.fromkeys(name for name in splits.values() if name is not None))
    if choice.split == ALL_SPLITS or (choice.split is None and not names):
        return paths
    outside = [str(path) for path in paths if splits[path] is None]
    other = _WORDS.get(choice.split or "")
    given = other if other in names and choice.split not in names else choice.split
    chosen = choose(str(folder), "splits", names, "--split", given, outside=outside)
    return [path for path in paths if splits[path] in chosen]


def choose(
    source: str, kind: str, names: Sequence[str], flag: str, given: str | None, *, outside: Sequence[str] = ()
) -> list[str]:
    """The splits or configurations to read: what ``given`` names, or the only one there is.

    Raises
    ------
    PromptError
        There are several and none was given, or there is no such one. The error lists them and names the flag.
    """
    everything = f", or {flag} {ALL_SPLITS}" if kind == "splits" else ""
    if given is None and len(names) + bool(outside) > 1:
        beside = f", and files of none of them: {_named(outside)}" if outside else ""
        raise PromptError(
            f"{source} contains several {kind}: {', '.join(names)}{beside}",
            hint=f"choose one with {flag} {names[0]}{everything}",
        )
    if given is None or (given == ALL_SPLITS and kind == "splits"):
        return list(names)
    if given not in names:
        raise PromptError(
            f"{source} has no {kind[:-1]} {shown(given)}; it has {', '.join(names) or 'none'}",
            hint=f"choose one of them with {flag}{everything}" if names else f"leave out {flag}",
        )
    return [given]


def refuse_choice(what: str, **given: str | None) -> None:
    """Refuse a ``split`` or ``config`` of a source that has none.

    Raises
    ------
    PromptError
    """
    flags = [f"--{name}" for name, value in given.items() if value is not None]
    if flags:
        lacking = " nor ".join(f"{name}s" if name == "split" else "configurations" for name in given)
        raise PromptError(
            f"{what}: it has {'neither' if len(given) > 1 else 'no'} {lacking}", hint=f"leave out {' and '.join(flags)}"
        )


def split_of(path: PurePosixPath) -> str | None:
    """The split that the path of a file below its dataset names, as the ``datasets`` library reads it.

    Examples
    --------
    >>> split_of(PurePosixPath("data/train_sft-00000-of-00002.parquet")), split_of(PurePosixPath("dev/a.jsonl"))
    ('train_sft', 'validation')
    >>> split_of(PurePosixPath("trains.jsonl")) is None
    True
    """
    match = _NUMBERED.match(path.name)
    if match and match["split"] not in _PARTS:
        return _WORDS.get(match["split"], match["split"])
    for part in (path.name, *(part for part in reversed(path.parts[:-1]) if "=" not in part)):
        words = [_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _WORDS]
        if words:
            return words[0]
    return None


def _nothing(folder: Path) -> PromptError:
    there = sorted(path.name for path in folder.iterdir())
    return PromptError(
        f"{folder} contains no prompts file: {_named(there) if there else 'it is empty'}",
        hint=f"files are known by their names: {', '.join(DATA)}, each also with {', '.join(PACKED)}",
    )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(shown(name) for name in names[:_MOST_NAMED]) + more
