"""The items of a dataset, whatever holds them: in blocks, with only the columns that a join reads.

Datasets of ``datasets``, pandas, polars and pyarrow are told apart by the methods they have, so none of these is imported.
Everything else is iterated, or indexed if it has a length. What people pass by mistake is named: a folder of splits, a path,
a lazy frame.

Shapes: M items, B items of a block.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core import arrow_values
from embstore.core.errors import ConfigError

BLOCK_ITEMS = 4096
# a shuffled or filtered dataset is read in the order of all its data if it selects at least this share of it
_DENSE = 1 / 16

# which of these columns to read
ChooseColumns = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some items: their ``positions`` int64 [B] in the dataset, and their values, by column or as given."""

    positions_B: NDArray[np.int64]
    columns: Mapping[str, Sequence[object]] | None = None
    items: Sequence[object] = ()


def blocks_of(dataset: object, choose: ChooseColumns) -> Iterator[Block]:
    """All items of a dataset, each once, not always in order.

    Raises
    ------
    ConfigError
        It is not a dataset, or has several splits; ``choose`` raises others.
    """
    _refuse_mistakes(dataset)
    given: Any = dataset
    if is_hugging_face(given):
        return _item_blocks(given) if has_transform(given) else _hugging_face_blocks(given, choose)
    if is_table(given):
        return _table_blocks(given, choose)
    if _is_arrow(given):
        return _item_blocks(arrow_values.values(given, arrow_values.decoder(given.type)))
    for method in ("to_list", "tolist"):  # columns of pandas and polars, and arrays
        if callable(getattr(given, method, None)):
            return _item_blocks(getattr(given, method)())
    return _item_blocks(_iterated(given))


def is_hugging_face(dataset: Any) -> bool:  # noqa: ANN401 - anything
    """Whether it is a dataset of the ``datasets`` library, streams included."""
    return isinstance(getattr(dataset, "column_names", None), list) and hasattr(dataset, "select_columns")


def has_transform(dataset: Any) -> bool:  # noqa: ANN401 - a dataset of ``datasets``
    """Whether its items are made by a function (``set_transform``) when they are read: columns then say nothing of them."""
    form = getattr(dataset, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def is_table(dataset: Any) -> bool:  # noqa: ANN401 - anything
    """Whether it is a table of pandas, polars or pyarrow: something with named columns, sliced by rows."""
    return hasattr(dataset, "columns") and (hasattr(dataset, "iloc") or hasattr(dataset, "slice"))


def _is_arrow(value: Any) -> bool:  # noqa: ANN401 - anything
    """Whether it is a table or a column of pyarrow."""
    return hasattr(value, "to_pylist")


def _refuse_mistakes(dataset: Any) -> None:  # noqa: ANN401 - anything
    if isinstance(dataset, Mapping):
        names = ", ".join(repr(str(name)) for name in list(dataset)[:20])
        first = next(iter(dataset), "train")
        if any(is_hugging_face(value) or is_table(value) for value in dataset.values()):
            raise ConfigError(
                f"this dataset consists of splits: {names}",
                hint=f"join the one that is trained on: for_dataset(dataset[{first!r}])",
            )
        raise ConfigError(
            f"a {type(dataset).__name__} with the entries {names} is not a dataset",
            hint="pass a list of records, or datasets.Dataset.from_dict(columns)",
        )
    if isinstance(dataset, str | bytes | os.PathLike):
        raise ConfigError(
            f"{str(dataset)[:200]!r} is a text or a path, not a dataset",
            hint="load the file first, such as datasets.load_dataset('parquet', data_files=PATH, split='train'); a single "
            "prompt goes in a list",
        )
    if not hasattr(dataset, "__len__") and hasattr(dataset, "collect_schema"):
        raise ConfigError(f"a {type(dataset).__name__} has no rows yet", hint="collect it: for_dataset(frame.collect())")


def _iterated(dataset: Any) -> Iterable[object]:  # noqa: ANN401 - anything
    if hasattr(dataset, "__iter__"):
        iterable: Iterable[object] = dataset
        return iterable
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        # not by Python's own protocol, which goes on until an IndexError that a dataset need not raise
        return (dataset[index] for index in range(len(dataset)))
    raise ConfigError(
        f"a value of type {type(dataset).__name__} is not a dataset: it has neither items nor an iterator",
        hint="pass a Hugging Face dataset, a data frame, a list of records, or the prompts themselves",
    )


def _item_blocks(items: Iterable[object]) -> Iterator[Block]:
    iterator, start = iter(items), 0
    while block := list(islice(iterator, BLOCK_ITEMS)):
        yield Block(positions_B=np.arange(start, start + len(block)), items=block)
        start += len(block)


def _table_blocks(table: Any, choose: ChooseColumns) -> Iterator[Block]:  # noqa: ANN401 - anything
    names = getattr(table, "column_names", None) or list(table.columns)  # of pyarrow; of pandas and polars
    wanted = choose([name for name in names if isinstance(name, str)])
    for name in wanted:
        if list(names).count(name) > 1:
            raise ConfigError(f"the table has several columns {name!r}", hint="rename or drop all but one of them")
    num_rows = getattr(table, "num_rows", None)
    for start in range(0, len(table) if num_rows is None else num_rows, BLOCK_ITEMS):
        part = table.iloc[start : start + BLOCK_ITEMS] if hasattr(table, "iloc") else table.slice(start, BLOCK_ITEMS)
        columns = _arrow_columns(part, wanted) if _is_arrow(part) else {name: part[name].to_list() for name in wanted}
        count = len(next(iter(columns.values())))
        yield Block(positions_B=np.arange(start, start + count), columns=columns)


def _arrow_columns(table: Any, names: list[str]) -> dict[str, list[object]]:  # noqa: ANN401 - pyarrow's
    """Columns as a build reads them."""
    decoders = arrow_values.decoders(table.schema, names)
    return {name: arrow_values.values(table.column(name), decoders.get(name)) for name in names}


def _hugging_face_blocks(dataset: Any, choose: ChooseColumns) -> Iterator[Block]:  # noqa: ANN401 - anything
    """Columns without the dataset's own format, so that no other column is decoded; values of a stream are Python's."""
    names = choose(dataset.column_names)
    selected = dataset.select_columns(names)
    is_stream = not hasattr(selected, "data")
    if hasattr(selected, "with_format"):
        selected = selected.with_format(None if is_stream else "arrow")
    rows_M = selected_rows(selected)
    if rows_M is None:
        start = 0
        for batch in selected.iter(batch_size=BLOCK_ITEMS):
            columns = batch if is_stream else _arrow_columns(batch, names)
            count = len(next(iter(columns.values())))
            yield Block(positions_B=np.arange(start, start + count), columns=columns)
            start += count
        return
    # a shuffled dataset costs a search for each row; all rows in their order cost next to nothing
    whole = without_selection(selected)
    by_row_M = np.argsort(rows_M, kind="stable")
    sorted_M = rows_M[by_row_M]
    for start in range(0, len(whole), BLOCK_ITEMS):
        found = slice(*np.searchsorted(sorted_M, [start, start + BLOCK_ITEMS]))
        if found.start == found.stop:
            continue
        picked = (sorted_M[found] - start).tolist()
        read = _arrow_columns(whole[start : start + BLOCK_ITEMS], names)
        columns = {name: [values[row] for row in picked] for name, values in read.items()}
        yield Block(positions_B=by_row_M[found], columns=columns)


def selected_rows(dataset: Any) -> NDArray[np.int64] | None:  # noqa: ANN401 - anything
    """Rows int64 [M] that a shuffled or filtered ``datasets.Dataset`` selects among all of its data.

    None if it selects none, or so few that all data should not be read for them.
    """
    indices = getattr(dataset, "_indices", None)
    if indices is None or len(dataset) < _DENSE * dataset.data.num_rows:
        return None
    return np.asarray(indices.column(0).to_numpy(), dtype=np.int64)


def without_selection(dataset: Any) -> Any:  # noqa: ANN401 - a dataset of the same class
    """The same dataset with all rows of its data, in their order."""
    whole = copy.copy(dataset)
    whole._indices = None  # there is no public way that copies nothing
    return whole
