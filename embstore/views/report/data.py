"""Everything a report shows, as values: read in one pass over the prompts, without torch.

Texts are kept for the prompts on the map only, and only as far as they are shown. Shapes: N rows, M rows on the map.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.decode import printable
from embstore.core.density import mean_distance
from embstore.core.errors import CorruptStoreError, StorageError
from embstore.core.files import file_size
from embstore.core.format import JsonObject, chunk_name
from embstore.core.prompts import Prompt
from embstore.core.sampling import seeded_sample
from embstore.flow.artifact import extremes
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.views.info import NO_VALUE, Share, StoreInfo, inspect, missing_field
from embstore.views.report import clusters, layout

MAP_ROWS = 100_000  # a browser draws more, but its file would no longer be one to send around
_TEXT_BYTES = 7_000_000  # of texts on the map, as the page contains them
_TEXT_CHARACTERS = 320
_EXAMPLE_CHARACTERS = 400
_GROUPS = 12
_EXAMPLES = 3
_RAREST = 15
# a field of the input lines is taken for the prompts' source by itself if it has this many values at most
_SOURCE_VALUES = 1000
_FIELDS = 64
_LIKELY_SOURCES = ("src", "source", "dataset", "task", "domain", "category", "subset")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One prompt as it is shown: ``text`` is one line without control characters, cut to a length."""

    row: int
    id: str
    text: str
    source: str
    weight: float
    mean_distance: float
    multiplicity: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A group of near prompts: how many, their shares, their most common source, and a few of them."""

    rows: int
    row_share: float
    weight_share: float
    source: str
    source_share: float
    median_distance: float
    examples: list[Example]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptMap:
    """The prompts on the plane, lightest first, so that heavy ones are drawn on top.

    ``pca`` and ``umap`` are float64 [M, 2]; ``text`` holds at most ``characters`` of each prompt.
    """

    rows: NDArray[np.int64]
    pca: NDArray[np.float64]
    pca_share: float
    umap: NDArray[np.float64] | None
    ids: list[str]
    text: list[str]
    characters: int
    is_sample: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """What a report shows. Arrays are [N]; ``weight`` is in units of the mean, NaN for a row without a vector.

    ``problems`` says what of the store is missing; ``source_field`` is None where no field tells the prompts' source.
    """

    name: str
    weights_name: str
    info: StoreInfo
    metadata: JsonObject
    problems: list[str]
    chunks: int
    weight: NDArray[np.float64]
    mean_distance: NDArray[np.float64]
    length: NDArray[np.int64]
    source: NDArray[np.int32]
    source_values: list[str]
    source_field: str | None
    sources: list[Share]
    map: PromptMap
    rarest: list[Example]
    crowded: list[Group]
    crowded_rows: int
    near_distance: float
    duplicates: list[Group]
    duplicate_groups: int
    duplicate_rows: int
    repeated: list[Example]


def read_report(path: str | Path, *, by: str | None = None, name: str = "default", map_rows: int = MAP_ROWS) -> ReportData:
    """Read what a report of a finished store shows.

    Parameters
    ----------
    path
        The store's folder.
    by
        The field of the input lines that tells a prompt's source; None takes ``src``, ``source``, ``dataset`` or the like.
    name
        Which weighting.
    map_rows
        Prompts on the map; of more, as many are drawn at random (the same ones each time).

    Raises
    ------
    StoreNotFoundError, IncompleteStoreError, CorruptStoreError, ConfigError
        No store, an unfinished or damaged one, or no such weighting.
    EmbstoreError
        No prompt has the field ``by``.
    """
    store = open_store(path)
    info = inspect(path, name=name, count=1)
    metadata = store.named_metadata(name)
    weights_N = store.named_weights(name)
    groups_N = np.asarray(store.groups)
    k = metadata["weighting"]["k"]
    distance_N = mean_distance(store.neighbor_distances, k)
    has_vector_N = groups_N >= 0
    if not has_vector_N.any():
        raise CorruptStoreError("no row of the store has a vector", hint=f"run embstore verify {path}")
    weight_N = np.where(has_vector_N, weights_N.astype(np.float64) * np.count_nonzero(has_vector_N), np.nan)
    shown = _rows_on_map(np.flatnonzero(has_vector_N), map_rows)
    shown = shown[np.argsort(weight_N[shown], kind="stable")]
    characters = int(np.clip(_TEXT_BYTES // max(1, len(shown)), 60, _TEXT_CHARACTERS))
    texts = _Texts(store.num_rows, shown, characters)
    for row, prompt in enumerate(store.prompts):
        texts.add(row, prompt)
    source_field, source_N, values = texts.source(by)
    view = _View(store, weight_N, distance_N, source_N, values)
    crowded = clusters.crowded_neighbourhoods(store.neighbor_ids, groups_N, distance_N, k)
    near = clusters.near_distance(store.neighbor_distances)
    duplicates = clusters.near_duplicates(store.neighbor_ids, store.neighbor_distances, groups_N, near)
    repeats = np.flatnonzero(np.asarray(store.multiplicity) > 1)
    most_repeated = repeats[np.argsort(-np.asarray(store.multiplicity)[repeats], kind="stable")][:_GROUPS]
    axes = layout.principal_axes(store.coordinates, shown, 2)
    return ReportData(
        name=printable(Path(path).resolve().name),
        weights_name=printable(name),
        info=info,
        metadata=metadata,
        problems=_problems(store),
        chunks=sum(len(window.chunks) for window in store.journal.windows.values()),
        weight=weight_N,
        mean_distance=distance_N,
        length=texts.length,
        source=source_N,
        source_values=values,
        source_field=source_field,
        sources=_shares(weights_N, source_N, values) if source_field is not None else [],
        map=PromptMap(
            rows=shown,
            pca=layout.plane(layout.project(store.coordinates, shown, axes)),
            pca_share=axes.share,
            umap=layout.umap_plane(store.coordinates, shown),
            ids=[printable(store.ids[row]) for row in shown],
            text=texts.on_map(),
            characters=characters,
            is_sample=len(shown) < int(np.count_nonzero(has_vector_N)),
        ),
        rarest=view.examples(extremes(distance_N, _RAREST)[0]),
        crowded=[view.group(part) for part in crowded[:_GROUPS]],
        crowded_rows=sum(len(part) for part in crowded),
        near_distance=near,
        duplicates=[view.group(part) for part in duplicates[:_GROUPS]],
        duplicate_groups=len(duplicates),
        duplicate_rows=sum(len(part) for part in duplicates),
        repeated=view.examples([int(row) for row in most_repeated]),
    )


def one_line(text: str, characters: int) -> str:
    r"""The beginning of a text as one line that is safe to show: whitespace runs become a space, controls are spelt out.

    Examples
    --------
    >>> one_line("a\n\tb \x1b[2J", 100)
    'a b \\x1b[2J'
    >>> one_line("abcdef", 4)
    'abc…'
    """
    flat = printable(" ".join(text[: 4 * characters].split()))
    return flat if len(flat) <= characters else flat[: characters - 1] + "…"


def _rows_on_map(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    if len(rows) <= most:
        return rows
    return rows[seeded_sample(len(rows), most, 0)]


@dataclass(slots=True)
class _Field:
    """Values of one field over all rows: a code a row, -1 where a line lacks it."""

    code: NDArray[np.int32]
    codes: dict[str, int] = field(default_factory=dict)
    rows: int = 0

    def add(self, row: int, value: object) -> None:
        text = printable(str(value))[:200]
        self.code[row] = self.codes.setdefault(text, len(self.codes))
        self.rows += 1


class _Texts:
    """What one pass over the prompts keeps."""

    def __init__(self, num_rows: int, shown: NDArray[np.int64], characters: int) -> None:
        self.length = np.zeros(num_rows, dtype=np.int64)
        self._characters = characters
        self._place = {int(row): place for place, row in enumerate(shown)}
        self._text = [""] * len(shown)
        self._fields: dict[str, _Field] = {}

    def add(self, row: int, prompt: Prompt) -> None:
        text = prompt.rendered
        self.length[row] = len(text)
        if (place := self._place.get(row)) is not None:
            self._text[place] = one_line(text, self._characters)
        for name, value in prompt.fields.items():
            known = self._fields.get(name)
            if known is None and len(self._fields) < _FIELDS:
                known = self._fields[name] = _Field(np.full(len(self.length), -1, dtype=np.int32))
            if known is not None and value is not None:
                known.add(row, value)

    def on_map(self) -> list[str]:
        """Texts in the map's order, cut further where letters of several bytes would make the page too large."""
        texts, characters = self._text, self._characters
        while (
            characters > 20 and sum(len(json.dumps(text, ensure_ascii=False).encode()) for text in texts) > 1.5 * _TEXT_BYTES
        ):
            characters //= 2
            texts = [one_line(text, characters) for text in texts]
        return texts

    def source(self, by: str | None) -> tuple[str | None, NDArray[np.int32], list[str]]:
        """The source field, a code for each row and the values of the codes; rows without the field count under (none)."""
        if by is not None and not (by in self._fields and self._fields[by].rows):
            raise missing_field(by, self._fields)
        name = by if by is not None else self._likely_source()
        if name is None:
            return None, np.zeros(len(self.length), dtype=np.int32), [""]
        found = self._fields[name]
        values = list(found.codes)
        if (found.code < 0).any():
            found.code[found.code < 0] = len(values)
            values.append(NO_VALUE)
        return name, found.code, values

    def _likely_source(self) -> str | None:
        num_rows = len(self.length)
        fitting = {
            name: each
            for name, each in self._fields.items()
            if 2 <= len(each.codes) <= min(_SOURCE_VALUES, num_rows // 4) and each.rows >= num_rows / 2
        }
        named = [name for name in _LIKELY_SOURCES if name in fitting]
        return named[0] if named else next(iter(fitting), None)


class _View:
    """Rows as examples and groups."""

    def __init__(
        self,
        store: EmbeddingStore,
        weight_N: NDArray[np.float64],
        distance_N: NDArray[np.float64],
        source_N: NDArray[np.int32],
        values: Sequence[str],
    ) -> None:
        self._store = store
        self._weight_N = weight_N
        self._distance_N = distance_N
        self._source_N = source_N
        self._values = values

    def examples(self, rows: Iterable[int]) -> list[Example]:
        rows = list(rows)
        return [
            Example(
                row=row,
                id=printable(str(prompt.id)),
                text=one_line(prompt.rendered, _EXAMPLE_CHARACTERS),
                source=self._values[self._source_N[row]],
                weight=float(self._weight_N[row]),
                mean_distance=float(self._distance_N[row]),
                multiplicity=int(self._store.multiplicity[row]),
            )
            for row, prompt in zip(rows, self._store.prompts.sample(rows), strict=True)
        ]

    def group(self, part: NDArray[np.int64]) -> Group:
        """A group with the prompts nearest its middle as examples: the most crowded ones."""
        order = part[np.argsort(self._distance_N[part], kind="stable")]
        counts = np.bincount(self._source_N[part], minlength=len(self._values))
        return Group(
            rows=len(part),
            row_share=len(part) / np.count_nonzero(np.isfinite(self._weight_N)),
            weight_share=float(np.nansum(self._weight_N[part]) / (np.nansum(self._weight_N) or 1.0)),
            source=self._values[int(counts.argmax())],
            source_share=float(counts.max() / len(part)),
            median_distance=float(np.median(self._distance_N[part])),
            examples=self.examples(int(row) for row in order[:_EXAMPLES]),
        )


def _shares(weights_N: NDArray[np.float32], source_N: NDArray[np.int32], values: Sequence[str]) -> list[Share]:
    """Shares of every value, those that gain most first."""
    rows = np.bincount(source_N, minlength=len(values))
    weight = np.bincount(source_N, weights=weights_N.astype(np.float64), minlength=len(values))
    found = [
        Share(value=value, rows=int(rows[code]), row_share=rows[code] / len(source_N), weight_share=float(weight[code]))
        for code, value in enumerate(values)
    ]
    return sorted(found, key=lambda share: (-share.ratio, share.value))


def _problems(store: EmbeddingStore) -> list[str]:
    """What opening a store does not check: that every row is committed and each chunk has its recorded size."""
    problems = []
    windows = store.journal.windows.values()
    if store.journal.committed_rows != store.num_rows:
        problems.append(f"the journal commits {store.journal.committed_rows:,} of {store.num_rows:,} rows")
    sizes: Mapping[int, int] = {chunk.index: chunk.bytes for window in windows for chunk in window.chunks}
    for index, size in sizes.items():
        path = chunk_name(index)
        try:
            found = file_size(store.root, path)
        except (CorruptStoreError, StorageError) as error:
            problems.append(str(error))
            continue
        if found != size:
            problems.append(f"{path} {'is missing' if found is None else f'has {found:,} bytes instead of {size:,}'}")
    return problems
