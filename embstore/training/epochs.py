"""Passes that can be left and resumed: what a sampler's state means, for every sampler here.

The state names the next draw also while the consumer holds this one; behind the last draw of a pass it names the first of
the next. A loaded state is used once: the next iteration starts there, any later one at the beginning of its pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError, WeightsError

_BLOCK = 4096
# fields of a state that say what the draws are, and not where in them a run is
_PLACE = frozenset({"epoch", "position"})


class Resumable(ABC):
    """A sampler whose order is a function of the epoch."""

    def __init__(self) -> None:
        self._epoch = 0
        self._position = 0  # of the next draw of this rank, in this pass
        self._is_resumed = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _rows_at(self, epoch: int) -> Callable[[slice], NDArray[np.int64]]:
        """The pass of an epoch, as a function from a range of this rank's positions to rows."""

    @abstractmethod
    def _identity(self) -> dict[str, object]:
        """What the draws depend on, as plain values."""

    @property
    @abstractmethod
    def num_replicas(self) -> int:
        """Ranks that share one pass."""

    @property
    def epoch(self) -> int:
        """The pass that the next draw belongs to."""
        return self._epoch

    def __iter__(self) -> Iterator[int]:
        start = self._position if self._is_resumed else 0
        self._is_resumed = False
        epoch, length = self._epoch, len(self)
        self._position = start
        rows_at = self._rows_at(epoch)
        for low in range(start, length, _BLOCK):
            block = rows_at(slice(low, min(low + _BLOCK, length)))
            for position, row in enumerate(block.tolist(), start=low + 1):
                self._position = position
                if position == length:
                    self._epoch, self._position = epoch + 1, 0
                yield row

    def plan(self, epoch: int) -> NDArray[np.int64]:
        """All rows that this rank draws in one pass, in order, int64 [len]."""
        return self._rows_at(epoch)(slice(0, len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass; another one starts at its beginning, the same one keeps a loaded position."""
        if not 0 <= epoch < 1 << 64:
            raise ConfigError(f"epoch must lie in 0..2**64 - 1, got {epoch}")
        if epoch != self._epoch:
            self._epoch, self._position, self._is_resumed = epoch, 0, False

    def seek(self, position: int) -> None:
        """Let the next iteration start at this draw of the pass, counted over all ranks.

        Raises
        ------
        ConfigError
            It lies outside the pass, or is no multiple of ``num_replicas``.
        """
        if not 0 <= position < len(self) * self.num_replicas or position % self.num_replicas:
            raise ConfigError(
                f"position {position} is not a multiple of num_replicas {self.num_replicas} in "
                f"0..{len(self) * self.num_replicas - 1}",
                hint="save states at whole global batches, or resume on as many processes as before",
            )
        self._position, self._is_resumed = position // self.num_replicas, True

    def state_dict(self) -> dict[str, object]:
        """Where the next draw is; plain values, safe to save anywhere. ``position`` counts over all ranks."""
        return {**self._identity(), "epoch": self._epoch, "position": self._position * self.num_replicas}

    def load_state_dict(self, state: Mapping[str, object], *, strict: bool = True) -> None:
        """Continue exactly where ``state_dict`` was taken, on as many processes or others.

        Parameters
        ----------
        state
            Of the same sampler.
        strict
            False takes epoch and position of a state of other weights or another method: the order is then another.

        Raises
        ------
        WeightsError
            The state is of other weights, another method, seed or length, or no state.
        """
        for field, own in self._identity().items():
            if strict and state.get(field) != own:
                raise WeightsError(
                    f"sampler state differs in {field}: saved {state.get(field)!r}, here {own!r}",
                    hint="make the sampler from the same store and settings as the saved run, or load with strict=False",
                )
        epoch, position = (state.get(field) for field in sorted(_PLACE))
        if type(epoch) is not int or type(position) is not int:
            raise WeightsError(f"this is no sampler state: epoch {epoch!r}, position {position!r}", hint="pass state_dict()")
        self.set_epoch(epoch)
        self.seek(position)
