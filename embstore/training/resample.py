"""Density sampling for trainers without a sampler hook: draw once, then train on the drawn items in order.

Shapes: N items, n draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embstore.core.errors import ConfigError, LengthMismatchError
from embstore.training.draws import Method
from embstore.training.resumable import LAST_EPOCH
from embstore.training.sampler import DensitySampler
from embstore.training.weights import Weights, check_vector, vector_of

DRAW_COLUMN = "embstore_draw"

_Item_co = TypeVar("_Item_co", covariant=True)


class SelectableDataset(Protocol):
    """The part of ``datasets.Dataset`` that is used here."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""

    def __len__(self) -> int: ...

    def select(self, indices: NDArray[np.int64]) -> Self:
        """The items at these indices, in this order."""

    def add_column(self, name: str, column: NDArray[np.int64]) -> Self:
        """The items with one more column."""

    def remove_columns(self, column_names: str) -> Self:
        """The items without a column."""


class Items(Protocol[_Item_co]):
    """A torch-style dataset: items by index, and a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _Item_co: ...


_Dataset = TypeVar("_Dataset", bound=SelectableDataset)


def resample_indices(
    weights: Weights | ArrayLike,
    num_samples: int | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    method: Method = "systematic",
    no_repeat_within: int = 0,
    over: int = 0,
    positional: bool = False,
) -> NDArray[np.int64]:
    """The indices of one epoch of ``DensitySampler``, in order, and ``over`` spare ones behind them.

    Spare draws are for trainers that drop items afterwards and train on the first ``num_samples`` that are left. They are
    another plan of the same weights, with its own quotas: ``DensitySampler(weights, num_samples=over).plan(2**64 - 1 -
    epoch)``, an epoch that no run reaches. So the draws before them stay what they are without ``over``, a longer file
    continues a run that began with a shorter one, and whatever is dropped, items that are left keep their proportions: an
    item of weight p is drawn floor or ceil of ``num_samples`` x p times, then floor or ceil of ``over`` x p times
    (systematic). More draws of one plan would have other quotas, and another order from the first draw on.

    Parameters
    ----------
    weights, num_samples, seed, epoch, method, no_repeat_within, positional
        See ``DensitySampler``. Repeats are kept apart among the draws and among the spare ones, not across.
    over
        Number of spare draws. If items that have a share d of the weight are dropped, d / (1 - d) x ``num_samples`` are
        needed on average.

    Returns
    -------
    int64 [num_samples + over].

    Raises
    ------
    ConfigError
        ``over`` is negative, or given with ``method="without_replacement"``, which draws an item at most once; others as in
        ``DensitySampler``.
    """
    if over < 0 or (over and method == "without_replacement"):
        raise ConfigError(
            f"over must be at least 0, and 0 with without_replacement; got {over} with {method}",
            hint="draw more: a larger num_samples",
        )

    def sampler(count: int | None) -> DensitySampler:
        return DensitySampler(
            weights,
            num_samples=count,
            method=method,
            seed=seed,
            no_repeat_within=no_repeat_within,
            positional=positional,
        )

    drawn_n = sampler(num_samples).plan(epoch)
    return np.concatenate([drawn_n, sampler(over).plan(LAST_EPOCH - epoch)]) if over else drawn_n


def resample_dataset(
    dataset: _Dataset,
    weights: Weights | ArrayLike,
    num_samples: int | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    method: Method = "systematic",
    no_repeat_within: int = 0,
    over: int = 0,
    reindex: str | None = None,
    positional: bool = False,
) -> _Dataset:
    """A Hugging Face dataset of the drawn items, in order; train on it without shuffling.

    Parameters
    ----------
    dataset
        ``datasets.Dataset``; its columns stay, and ``embstore_draw`` (int64) numbers the draws.
    weights
        One per item: ``load_weights(STORE).for_dataset(dataset)``.
    num_samples, seed, epoch, method, no_repeat_within, over, positional
        See ``resample_indices``.
    reindex
        A column to renumber, 0 to n - 1: for trainers that look items up by number.

    Raises
    ------
    LengthMismatchError
        The numbers of weights and items differ.
    ConfigError
        The dataset has an ``embstore_draw`` already, or no column called ``reindex``; or the weights are not joined.
    """
    _check_length(dataset, weights)
    if DRAW_COLUMN in dataset.column_names:
        raise ConfigError(f"the dataset has a column {DRAW_COLUMN}: it is resampled already", hint="resample the original")
    if reindex is not None and reindex not in dataset.column_names:
        raise ConfigError(f"the dataset has no column {reindex!r} to renumber; it has {', '.join(dataset.column_names)}")
    rows_n = resample_indices(
        weights,
        num_samples,
        seed=seed,
        epoch=epoch,
        method=method,
        no_repeat_within=no_repeat_within,
        over=over,
        positional=positional,
    )
    drawn = dataset.select(rows_n)
    if reindex is not None:
        drawn = drawn.remove_columns(reindex).add_column(reindex, np.arange(len(rows_n)))
    return drawn.add_column(DRAW_COLUMN, np.arange(len(rows_n)))


class IndexedView(Generic[_Item_co]):
    """A view of a dataset in the order of ``indices``: item i is ``dataset[indices[i]]``; nothing is copied.

    For trainers that accept any torch-style dataset and read it in order.
    """

    def __init__(self, dataset: Items[_Item_co], indices: NDArray[np.int64] | Sequence[int]) -> None:
        indices_n = np.asarray(indices, dtype=np.int64)
        if len(indices_n) and not (indices_n.min() >= 0 and indices_n.max() < len(dataset)):
            raise LengthMismatchError(
                f"indices range from {indices_n.min()} to {indices_n.max()}, the dataset has {len(dataset)} items",
                hint="join the weights to this dataset: load_weights(STORE).for_dataset(dataset)",
            )
        self.dataset = dataset
        self.indices_n = indices_n

    def __len__(self) -> int:
        return len(self.indices_n)

    def __getitem__(self, index: int) -> _Item_co:
        return self.dataset[int(self.indices_n[index])]


def importance_weights(
    weights: Weights | ArrayLike, indices: ArrayLike | None = None, *, positional: bool = False
) -> NDArray[np.float64]:
    """Loss weights that undo the sampling: 1 / (N p_i), float64, mean 1 over the draws given.

    The mean of the loss times these weights estimates the plain mean over all items of weight > 0.

    Parameters
    ----------
    weights
        The weights that were drawn from.
    indices
        The draws; default: every item of weight above 0, in order.
    positional
        See ``DensitySampler``.

    Raises
    ------
    ConfigError
        An index has weight 0, so it cannot have been drawn; or the weights are not joined.
    """
    array = vector_of(weights, positional=positional)
    check_vector("weights", array)
    rows_n = np.flatnonzero(array) if indices is None else np.asarray(indices, dtype=np.int64)
    drawn_n = array[rows_n].astype(np.float64)
    if not (drawn_n > 0).all():
        row = int(rows_n[int(np.argmin(drawn_n > 0))])
        raise ConfigError(
            f"index {row} has weight 0, so it cannot have been drawn", hint="pass the weights that were drawn from"
        )
    inverse_n = 1 / drawn_n
    result: NDArray[np.float64] = inverse_n / inverse_n.mean()
    return result


def _check_length(dataset: SelectableDataset, weights: Weights | ArrayLike) -> None:
    count = len(weights) if isinstance(weights, Weights) else len(np.asarray(weights))
    if count != len(dataset):
        raise LengthMismatchError(
            f"{count} weights, the dataset has {len(dataset)} items",
            hint="join them: load_weights(STORE).for_dataset(dataset)",
        )
