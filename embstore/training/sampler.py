"""DensitySampler: draws dataset indices in proportion to their weights, for any loader that takes an iterable with a length.

Shapes: N rows.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embstore.core.errors import ConfigError
from embstore.training.draws import Method, check_spread, check_without_replacement, draw
from embstore.training.resumable import Resumable, differs
from embstore.training.weights import Weights, check_vector, sha256_of, vector_of

_STATE_VERSION = 1
# versions of the drawing algorithms: a change of the order needs a new number
_ALGORITHMS = {"systematic": "systematic-3", "without_replacement": "without-replacement-2", "iid": "iid-1"}
# those of pickles that name none
_UNNAMED = {"systematic": "systematic-2", "without_replacement": "without-replacement-1", "iid": "iid-1"}


class DensitySampler(Resumable):
    """Draws dataset indices in proportion to their weights.

    The order is a pure function of (weights, num_samples, method, no_repeat_within, seed, epoch), from raw Philox words.
    Rank-agnostic by default: trainers that shard by themselves (TRL, accelerate, verl) need the same sequence on every
    rank. ``state_dict`` and ``load_state_dict`` resume at any draw.

    Parameters
    ----------
    weights
        ``load_weights(STORE).for_dataset(dataset)``, or any non-negative vector with a positive sum.
    num_samples
        Draws per epoch over all ranks; default: one per row.
    method
        "systematic": each epoch draws an index floor or ceil of its quota ``num_samples * weight`` times; independent draws
        would miss about a third of the rows. "without_replacement": at most once per epoch, with inclusion probabilities
        proportional to the weights up to 1; needs fewer draws than rows. "iid": independent draws.
    seed
        0 <= seed < 2**64.
    rank, num_replicas
        For training loops that do not shard: this process gets draws rank, rank + num_replicas, ...; a remainder is dropped.
        ``rank="auto"`` asks torch.distributed, if torch is loaded and a process group is initialised.
    no_repeat_within
        Minimum distance of repeats of a row within an epoch, in draws (systematic only; not across epochs).
    positional
        Needed for weights of a store that were not joined to a dataset: the draws are then the store's own row numbers.
    recount_epochs
        For trainers that count epochs from 0 again after a resume: once a state is loaded, ``set_epoch(0)`` means its epoch.

    Raises
    ------
    InvalidWeightsError
        The vector is empty, not finite, negative somewhere, or sums to 0.
    ConfigError
        A setting is out of range, or the weights were not joined to a dataset.
    """

    def __init__(
        self,
        weights: Weights | ArrayLike,
        *,
        num_samples: int | None = None,
        method: Method = "systematic",
        seed: int = 0,
        rank: int | Literal["auto"] = 0,
        num_replicas: int = 1,
        no_repeat_within: int = 0,
        positional: bool = False,
        recount_epochs: bool = False,
    ) -> None:
        super().__init__(recount_epochs=recount_epochs)
        array = vector_of(weights, positional=positional)
        check_vector("weights", array)
        self._fingerprint = weights.fingerprint if isinstance(weights, Weights) else sha256_of(array)
        if method not in _ALGORITHMS:
            raise ConfigError(f"method must be one of {', '.join(_ALGORITHMS)}, got {method!r}")
        if not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed must lie in 0..2**64 - 1, got {seed}")
        if num_samples is not None and num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
        if no_repeat_within < 0 or (no_repeat_within and method != "systematic"):
            raise ConfigError(
                f"no_repeat_within must be 0, or used with method='systematic'; got {no_repeat_within} with {method}"
            )
        self._weights_file = weights.path if isinstance(weights, Weights) and weights.weighting is not None else None
        self._weights_N = array
        self._method = method
        self._algorithm = _ALGORITHMS[method]
        self._num_samples = len(array) if num_samples is None else num_samples
        self._seed = seed
        self._no_repeat_within = no_repeat_within
        self._rank, self._num_replicas = _distributed() if rank == "auto" else (rank, num_replicas)
        if not 0 <= self._rank < self._num_replicas <= self._num_samples:
            raise ConfigError(
                f"rank {self._rank} of num_replicas {self._num_replicas} with num_samples {self._num_samples}: "
                "rank must be below num_replicas, and each rank must draw at least once"
            )
        if no_repeat_within:
            check_spread(array, self._num_samples, no_repeat_within)
        if method == "without_replacement" and (certain := check_without_replacement(array, self._num_samples)):
            warnings.warn(
                f"without_replacement: {certain} rows are drawn in every epoch, because their share of "
                f"{self._num_samples} draws is 1 or more; their inclusion probability is limited to 1",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return self._num_samples // self._num_replicas

    @property
    def num_rows(self) -> int:
        """Length of the dataset that is drawn from."""
        return len(self._weights_N)

    @property
    def num_replicas(self) -> int:
        """Ranks that share the draws of an epoch."""
        return self._num_replicas

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self._rank

    @property
    def weights_file(self) -> Path | None:
        """The file of a store that the weights come from; None if they come from elsewhere."""
        return self._weights_file

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = _ALGORITHMS[state["_method"]]
        state.setdefault("_weights_file", None)
        saved = state.setdefault("_algorithm", _UNNAMED[state["_method"]])
        if saved != own:
            raise differs("pickled sampler", "method", saved, own, epoch=state["_epoch"])
        super().__setstate__(state)

    def _rows_at(self, epoch: int) -> Callable[[slice], NDArray[np.int64]]:
        found, left = draw(
            self._weights_N,
            self._num_samples,
            method=self._method,
            seed=self._seed,
            epoch=epoch,
            no_repeat_within=self._no_repeat_within,
        )
        if left:
            warnings.warn(
                f"{left} repeats are less than no_repeat_within = {self._no_repeat_within} draws apart in epoch {epoch}: "
                "no better place was found for them",
                stacklevel=2,
            )
        rank, step = self._rank, self._num_replicas
        return lambda own: found.rows(slice(rank + own.start * step, rank + (own.stop - 1) * step + 1, step))

    def _identity(self) -> dict[str, object]:
        return {
            "version": _STATE_VERSION,
            "method": self._algorithm,
            "seed": self._seed,
            "num_samples": self._num_samples,
            "no_repeat_within": self._no_repeat_within,
            "fingerprint": self._fingerprint,
        }


def _distributed() -> tuple[int, int]:
    """Rank and world size of torch.distributed; (0, 1) if torch is not loaded or no process group is initialised."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return int(distributed.get_rank()), int(distributed.get_world_size())
