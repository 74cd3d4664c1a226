"""Everything a report shows, as values: read in one pass over the prompts, or two to find their source. No torch.

Texts and ids are kept for the prompts on the map only, and only as far as they are shown; of the others, a few numbers each.
Shapes: N rows, M rows on the map.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from embstore.storage.prompt_table import PromptTable
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.views.field_values import NAMED_VALUES, FieldValues, Share, Spread, missing_field
from embstore.views.info import StoreInfo, inspect
from embstore.views.report import clusters, layout

MAP_ROWS = 100_000  # a browser draws more, but its file would no longer be one to send around
_TEXT_BYTES = 7_000_000  # of texts on the map, as the page contains them
_TEXT_CHARACTERS = 320
_EXAMPLE_CHARACTERS = 400
_GROUPS = 12
_EXAMPLES = 3
_RAREST = 15
_FIELDS = 64
_FIRST_ROWS = 4096  # by these the source is guessed, so that one pass is enough where they are like the others
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

    ``problems`` says what of the store is missing. ``source_field`` is None where no field tells the prompts' source;
    ``source`` has a row's position in ``source_values``, whose last entry may stand for all values without an entry:
    ``num_sources`` counts every value, ``sources`` has those with an entry.
    """

    name: str
    weights_name: str
    info: StoreInfo
    metadata: JsonObject
    problems: list[str]
    chunks: int
    weight: NDArray[np.float64]
    mean_distance: NDArray[np.float64]
    length: NDArray[np.int32]
    source: NDArray[np.int16]
    source_values: list[str]
    source_field: str | None
    num_sources: int
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
    has_vector_N = groups_N >= 0
    num_vectors = int(np.count_nonzero(has_vector_N))
    if not num_vectors:
        raise CorruptStoreError("no row of the store has a vector", hint=f"run embstore verify {path}")
    shown = _rows_on_map(np.flatnonzero(has_vector_N), map_rows)
    shown = shown[np.argsort(weights_N[shown], kind="stable")]
    characters = int(np.clip(_TEXT_BYTES // max(1, len(shown)), 60, _TEXT_CHARACTERS))
    texts = _Texts(store.num_rows, shown, characters)
    source_field, spread = _read_prompts(store.prompts, texts, weights_N, by)
    k = metadata["weighting"]["k"]
    distance_N = mean_distance(store.neighbor_distances, k)
    weight_N = weights_N.astype(np.float64)
    weight_N *= num_vectors
    weight_N[~has_vector_N] = np.nan
    values = _values(spread)
    view = _View(store, weight_N, distance_N, spread.code, values)
    rarest = view.examples(extremes(distance_N, _RAREST)[0])
    repeats = np.flatnonzero(np.asarray(store.multiplicity) > 1)
    most_repeated = repeats[np.argsort(-np.asarray(store.multiplicity)[repeats], kind="stable")][:_GROUPS].tolist()
    del repeats
    crowded = clusters.crowded_neighbourhoods(store.neighbor_ids, groups_N, distance_N, k, most=_GROUPS)
    near = clusters.near_distance(store.neighbor_distances)
    duplicates = clusters.near_duplicates(store.neighbor_ids, store.neighbor_distances, groups_N, near, most=_GROUPS)
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
        source=spread.code,
        source_values=values,
        source_field=source_field,
        num_sources=len(spread.shares) + (spread.others.values if spread.others is not None else 0),
        sources=sorted(spread.shares, key=lambda share: (-share.ratio, share.value)),
        map=PromptMap(
            rows=shown,
            pca=layout.plane(layout.project(store.coordinates, shown, axes)),
            pca_share=axes.share,
            umap=layout.umap_plane(store.coordinates, shown),
            ids=texts.ids,
            text=texts.on_map(),
            characters=characters,
            is_sample=len(shown) < num_vectors,
        ),
        rarest=rarest,
        crowded=[view.group(part) for part in crowded.largest],
        crowded_rows=crowded.rows,
        near_distance=near,
        duplicates=[view.group(part) for part in duplicates.largest],
        duplicate_groups=duplicates.count,
        duplicate_rows=duplicates.rows,
        repeated=view.examples(most_repeated),
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


class _Fields:
    """The fields that prompts have, as far as it takes to tell which of them may name their source."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}  # that have the field
        self._hashes: dict[str, set[int]] = {}  # of its values, until there are too many for a source

    def add(self, fields: Mapping[str, object]) -> None:
        for name, value in fields.items():
            if value is None:  # only rule 1 of prompts keeps nulls
                continue
            if name not in self.rows:
                if len(self.rows) == _FIELDS:
                    continue
                self.rows[name], self._hashes[name] = 0, set()
            self.rows[name] += 1
            if (seen := self._hashes.get(name)) is not None:
                seen.add(hash(str(value)))
                if len(seen) > NAMED_VALUES:
                    del self._hashes[name]

    def likely_source(self, num_rows: int) -> str | None:
        """The field that is taken for the source of ``num_rows`` prompts by itself."""
        fitting = [
            name
            for name, seen in self._hashes.items()
            if 2 <= len(seen) <= num_rows // 4 and self.rows[name] >= num_rows / 2
        ]
        named = [name for name in _LIKELY_SOURCES if name in fitting]
        return next(iter(named + fitting), None)


class _Texts:
    """What a pass over the prompts keeps: lengths of all texts, and ids and beginnings of those on the map."""

    def __init__(self, num_rows: int, shown: NDArray[np.int64], characters: int) -> None:
        self.length = np.zeros(num_rows, dtype=np.int32)
        self.ids = [""] * len(shown)
        self._characters = characters
        self._place = {int(row): place for place, row in enumerate(shown)}
        self._text = [""] * len(shown)

    def add(self, row: int, prompt: Prompt) -> None:
        text = prompt.rendered
        self.length[row] = len(text)
        if (place := self._place.get(row)) is not None:
            self.ids[place] = printable(str(prompt.id))
            self._text[place] = one_line(text, self._characters)

    def on_map(self) -> list[str]:
        """Texts in the map's order, cut further where letters of several bytes would make the page too large."""
        texts, characters = self._text, self._characters
        while (
            characters > 20 and sum(len(json.dumps(text, ensure_ascii=False).encode()) for text in texts) > 1.5 * _TEXT_BYTES
        ):
            characters //= 2
            texts = [one_line(text, characters) for text in texts]
        return texts


def _read_prompts(
    table: PromptTable, texts: _Texts, weights_N: NDArray[np.float32], by: str | None
) -> tuple[str | None, Spread]:
    """Read every prompt; the source field and the shares of its values, none of either where no field tells it.

    Raises
    ------
    EmbstoreError
        No prompt has the field ``by``.
    """
    num_rows = len(table)
    first, fields = _Fields(), _Fields()
    for prompt in itertools.islice(table, _FIRST_ROWS):
        first.add(prompt.fields)
    guess = by if by is not None else first.likely_source(min(num_rows, _FIRST_ROWS))
    values = FieldValues(guess, num_rows) if guess is not None else None
    for row, prompt in enumerate(table):
        texts.add(row, prompt)
        fields.add(prompt.fields)
        if values is not None:
            values.add(row, prompt.fields)
    name = by if by is not None else fields.likely_source(num_rows)
    if name is None:
        return None, Spread(shares=[], others=None, code=np.zeros(num_rows, dtype=np.int16))
    if values is None or name != guess:
        values = FieldValues.read(name, table)
    if not values.is_present:
        raise missing_field(name, fields.rows)
    return name, values.spread(table, weights_N)


def _values(spread: Spread) -> list[str]:
    """What each code of the spread stands for, as it is shown."""
    if not spread.shares:
        return [""]
    others = [f"(one of {spread.others.values:,} other values)"] if spread.others is not None else []
    return [printable(share.value) for share in spread.shares] + others


class _View:
    """Rows as examples and groups."""

    def __init__(
        self,
        store: EmbeddingStore,
        weight_N: NDArray[np.float64],
        distance_N: NDArray[np.float64],
        source_N: NDArray[np.int16],
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

    def group(self, part: NDArray[np.int32]) -> Group:
        """A group with the prompts nearest its middle as examples: the most crowded ones."""
        nearest = part[np.argsort(self._distance_N[part], kind="stable")[:_EXAMPLES]]
        counts = np.bincount(self._source_N[part], minlength=len(self._values))
        return Group(
            rows=len(part),
            row_share=len(part) / np.count_nonzero(np.isfinite(self._weight_N)),
            weight_share=float(np.nansum(self._weight_N[part]) / (np.nansum(self._weight_N) or 1.0)),
            source=self._values[int(counts.argmax())],
            source_share=float(counts.max() / len(part)),
            median_distance=float(np.median(self._distance_N[part])),
            examples=self.examples(nearest.tolist()),
        )


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
