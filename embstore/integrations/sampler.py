"""A sampler that a trainer's configuration names: it loads the weights of a store and joins them to the trainer's dataset.

SkyRL SFT takes it as it is:

    sampler=custom sampler_class_path=embstore.integrations.sampler.StoreSampler sampler_kwargs={store: STORE, source: FILE}

and so does other code that makes a sampler of a dataset and settings. The loader must split the order among ranks itself.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embstore.core.errors import ConfigError, LengthMismatchError
from embstore.training import Weights, load_weights
from embstore.training.draws import Method
from embstore.training.join import Duplicates, OnMissing
from embstore.training.torch import DensitySampler


class StoreSampler(DensitySampler):
    """``DensitySampler`` over the weights of a store, joined to the dataset that a trainer hands over.

    Parameters
    ----------
    data_source
        The trainer's dataset, of M items: what ``Weights.for_dataset`` takes, or an object that holds such a dataset as
        ``dataframe`` (verl's ``RLHFDataset``, SkyRL's ``PromptDataset``). Only its length is used with ``keys``,
        ``source`` and ``positional``, which are for items that have no prompt any more.
    data_config
        For trainers that hand over their settings (verl): unless ``store`` is given, ``data_config["density"]`` has the
        options below. ``key_column`` and ``seed`` default to its ``prompt_key`` and ``seed``.
    store, name
        A finished store, and the name of its weighting.
    key_column, id_column, on_missing, duplicates
        See ``Weights.for_dataset``.
    keys
        uint64 [M] row keys of the items (``prompt_keys`` makes them) or their ids as text; or the ``.npy`` file of either.
    source
        The file whose rows the items are, in their order, none left out: JSONL or Parquet. Or a dataset as
        ``datasets.load_dataset`` takes it, ``NAME`` or ``NAME:SPLIT``. Several if the trainer puts them one after another.
    positional
        The items are the rows of the store, in its order.
    lengths
        The trainer's numbers of items per source (SkyRL): compared with those of ``source``.
    num_samples, method, seed, no_repeat_within, recount_epochs
        See ``DensitySampler``.

    Raises
    ------
    ConfigError
        There is no store, an option is unknown, there are several ways to join, or the items are tokens and there is none.
    LengthMismatchError
        ``keys``, ``source`` or the store has another length than the dataset.
    KeyMismatchError, WeightsError
        Items are not in the store, or its weights cannot be loaded.
    """

    def __init__(
        self,
        data_source: Any,  # noqa: ANN401 - anything that has items
        data_config: Mapping[str, Any] | None = None,
        *,
        store: str | Path | None = None,
        name: str = "default",
        key_column: str | None = None,
        id_column: str | None = None,
        keys: str | Path | ArrayLike | Sequence[str] | None = None,
        source: str | Path | Sequence[str | Path] | None = None,
        positional: bool = False,
        on_missing: OnMissing = "error",
        duplicates: Duplicates = "repeat",
        lengths: Sequence[int] | None = None,
        num_samples: int | None = None,
        method: Method = "systematic",
        seed: int = 0,
        no_repeat_within: int = 0,
        recount_epochs: bool = False,
    ) -> None:
        if data_config is not None and store is None:
            StoreSampler.__init__(self, data_source, **configured(data_config))
            return
        if data_config is not None and data_config.get("density") is not None:
            raise ConfigError(
                f"the store is given twice: {store}, and in the settings of the data, {data_config['density']}",
                hint="remove the argument, or data.density",
            )
        if store is None:
            raise ConfigError("the sampler was given no store", hint="set store: the folder that embstore build made")
        if sum((keys is not None, source is not None, positional)) > 1:
            raise ConfigError("keys, source and positional are three ways to join", hint="choose one of them")
        weights = load_weights(store, name=name)
        dataset = getattr(data_source, "dataframe", data_source)
        if keys is not None:
            array = np.load(keys, allow_pickle=False) if isinstance(keys, str | Path) else keys
            weights = weights.align(array, on_missing=on_missing, duplicates=duplicates)
        elif not positional:
            if source is not None:
                dataset = _rows_of(source, lengths)
            else:
                _refuse_tokens(dataset, weights, key_column, id_column)
            weights = weights.for_dataset(
                dataset, key_column=key_column, id_column=id_column, on_missing=on_missing, duplicates=duplicates
            )
        if len(weights) != len(data_source):
            origin = "keys" if keys is not None else "source" if source is not None else f"the store {store}"
            raise LengthMismatchError(
                f"{origin} has {len(weights)} rows, the trainer's dataset has {len(data_source)} items",
                hint="the trainer dropped rows, or read others: pass the keys of the items that it has (keys=)",
            )
        super().__init__(
            weights,
            num_samples=num_samples,
            method=method,
            seed=seed,
            no_repeat_within=no_repeat_within,
            positional=positional,
            recount_epochs=recount_epochs,
        )


def configured(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``StoreSampler`` in the settings of a trainer's data: its ``density`` part.

    Raises
    ------
    ConfigError
        There is no such part, it is not a group, or it has an option that the sampler does not take.
    """
    density = data_config.get("density")
    if density is None:
        raise ConfigError("the settings of the data have no density part", hint="name the store in it: density.store=STORE")
    if not isinstance(density, Mapping):
        raise ConfigError(f"density is {density!r}, not a group of options", hint=f"write density.store={density}")
    taken = list(inspect.signature(StoreSampler).parameters)[2:]
    if unknown := [str(option) for option in density if option not in taken]:
        raise ConfigError(f"density has no option {', '.join(unknown)}", hint=f"it takes {', '.join(taken)}")
    options = dict(density)
    if options.keys().isdisjoint(("key_column", "id_column", "keys", "source", "positional")):
        options["key_column"] = data_config.get("prompt_key")
    return {"seed": data_config.get("seed") or 0, **options}


def _rows_of(source: str | Path | Sequence[str | Path], lengths: Sequence[int] | None) -> Any:  # noqa: ANN401 - a dataset
    """The rows of one or more files or datasets, one after another."""
    import datasets  # noqa: PLC0415 - a trainer that tokenizes has it

    parts = []
    for given in [source] if isinstance(source, str | Path) else source:
        if Path(given).is_file():
            kind = "parquet" if Path(given).suffix == ".parquet" else "json"
            parts.append(datasets.load_dataset(kind, data_files=str(given), split="train"))
        else:
            dataset, _, split = str(given).partition(":")
            parts.append(datasets.load_dataset(dataset, split=split or "train"))
    found = [len(part) for part in parts]
    if lengths is not None and found != list(lengths):
        raise LengthMismatchError(
            f"source has {found} rows, the trainer's datasets have {list(lengths)}",
            hint="name the sources in the trainer's order; if it drops rows, pass the keys of the items that it has (keys=)",
        )
    return parts[0] if len(parts) == 1 else itertools.chain.from_iterable(parts)


def _refuse_tokens(dataset: Any, weights: Weights, key_column: str | None, id_column: str | None) -> None:  # noqa: ANN401
    """Say what to do if the items are tokens, before a join says that none of them has a prompt."""
    first = dataset[0] if len(dataset) else None
    if isinstance(first, Mapping) and "input_ids" in first and id_column is None:
        try:
            weights.reading(key_column).choose(list(first))
        except ConfigError as error:
            raise ConfigError(
                f"the items that the trainer hands over are tokens, and have no prompt to join by: {', '.join(first)}",
                hint="source=FILE names the file whose rows they are, if the trainer drops none; otherwise keys=FILE, made "
                "by numpy.save of prompt_keys; positional=True if the items are the rows of the store",
            ) from error
