"""Resumable sampling: what the state of every sampler here means.

The state points to the next draw, even while the consumer still works on the current one; after the last draw of an epoch
it points to the start of the next. A loaded state applies to the next iteration only; later ones start their epoch at its
beginning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError, WeightsError
from embstore.core.rows import slices

_BLOCK = 4096
# fields of a state that say where a run is, not what its draws are
_PLACE = frozenset({"epoch", "position"})


class Resumable(ABC):
    """A sampler whose order is a function of the epoch."""

    def __init__(self) -> None:
        self._epoch = 0
        self._position = 0  # of this rank's next draw in the epoch
        self._is_resumed = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _rows_at(self, epoch: int) -> Callable[[slice], NDArray[np.int64]]:
        """The draws of an epoch, as a function from a range of this rank's positions to rows."""

    @abstractmethod
    def _identity(self) -> dict[str, object]:
        """Everything the draws depend on, as plain values."""

    @property
    @abstractmethod
    def num_replicas(self) -> int:
        """Ranks that share the draws of an epoch."""

    @property
    def epoch(self) -> int:
        """The epoch of the next draw."""
        return self._epoch

    def __iter__(self) -> Iterator[int]:
        start = self._position if self._is_resumed else 0
        self._is_resumed = False
        epoch, length = self._epoch, len(self)
        self._position = start
        rows_at = self._rows_at(epoch)
        for part in slices(start, length, _BLOCK):
            for position, row in enumerate(rows_at(part).tolist(), start=part.start + 1):
                self._position = position
                if position == length:
                    self._epoch, self._position = epoch + 1, 0
                yield row

    def plan(self, epoch: int) -> NDArray[np.int64]:
        """All rows that this rank draws in one epoch, in order, int64 [len]."""
        return self._rows_at(epoch)(slice(0, len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch: a different one starts at its beginning, the same one keeps a loaded position."""
        if not 0 <= epoch < 1 << 64:
            raise ConfigError(f"epoch must lie in 0..2**64 - 1, got {epoch}")
        if epoch != self._epoch:
            self._epoch, self._position, self._is_resumed = epoch, 0, False

    def seek(self, position: int) -> None:
        """Let the next iteration start at this draw of the epoch, counted over all ranks.

        Raises
        ------
        ConfigError
            It lies outside the epoch, or is not a multiple of ``num_replicas``.
        """
        if not 0 <= position < len(self) * self.num_replicas or position % self.num_replicas:
            raise ConfigError(
                f"position {position} is not a multiple of num_replicas {self.num_replicas} in "
                f"0..{len(self) * self.num_replicas - 1}",
                hint="save states at whole global batches, or resume on as many processes as before",
            )
        self._position, self._is_resumed = position // self.num_replicas, True

    def state_dict(self) -> dict[str, object]:
        """Position of the next draw as plain values that any checkpoint can store; ``position`` counts over all ranks."""
        return {**self._identity(), "epoch": self._epoch, "position": self._position * self.num_replicas}

    def load_state_dict(self, state: Mapping[str, object], *, strict: bool = True) -> None:
        """Continue exactly where ``state_dict`` was taken, on the same or another number of processes.

        Parameters
        ----------
        state
            A state of the same sampler.
        strict
            False accepts epoch and position from a state of other weights or another method: the order then differs.

        Raises
        ------
        WeightsError
            The state belongs to other weights, another method, seed or length, or is not a sampler state.
        """
        for field, own in self._identity().items():
            if strict and state.get(field) != own:
                raise WeightsError(
                    f"sampler state differs in {field}: saved {state.get(field)!r}, here {own!r}",
                    hint="make the sampler from the same store and settings as the saved run, or load with strict=False",
                )
        epoch, position = (state.get(field) for field in sorted(_PLACE))
        if type(epoch) is not int or type(position) is not int:
            raise WeightsError(
                f"this is not a sampler state: epoch {epoch!r}, position {position!r}", hint="pass state_dict()"
            )
        self.set_epoch(epoch)
        self.seek(position)
