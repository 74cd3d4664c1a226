"""Resumable sampling: what the state of every sampler here means.

The state points to the next draw, even while the consumer still works on the current one; after the last draw of an epoch
it points to the start of the next. A loaded state applies to the next iteration only; later ones start their epoch at its
beginning. An epoch that a loaded state has finished is empty if the trainer announces it again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError, WeightsError
from embstore.core.rows import slices

_BLOCK = 4096
LAST_EPOCH = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class _Block:
    """Draws on their way to the consumer; how many are left says where the iteration is, at no cost per draw."""

    draws: Iterator[int]
    stop: int  # this rank's position behind the block

    @property
    def position(self) -> int:
        """Position of the next draw, of this rank."""
        return self.stop - length_hint(self.draws)


class Resumable(ABC):
    """A sampler whose order is a function of the epoch.

    Parameters
    ----------
    recount_epochs
        The trainer counts from 0 again after a resume: once a state is loaded, ``set_epoch(0)`` means its epoch.
    """

    def __init__(self, *, recount_epochs: bool = False) -> None:
        self._recount_epochs = recount_epochs
        self._first_epoch = 0  # what set_epoch(0) means
        self._epoch = 0
        self._position = 0  # of this rank's next draw in the epoch, while no block is on its way
        self._block: _Block | None = None
        self._announced: int | None = None  # by set_epoch, since the last iteration began
        self._finished: int | None = None  # the epoch before a loaded state, if that points to the start of an epoch
        self._empty_iterations = 0  # still to come, because the announced epoch is finished

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
    @abstractmethod
    def weights_file(self) -> Path | None:
        """The file of a store that the weights come from; None if they come from elsewhere."""

    @property
    def epoch(self) -> int:
        """The epoch of the next draw."""
        return self._place()[0]

    @property
    def recount_epochs(self) -> bool:
        """Whether ``set_epoch`` counts from the epoch of the loaded state."""
        return self._recount_epochs

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[Iterator[int]]:
        self._announced = None
        if self._empty_iterations:
            self._empty_iterations -= 1
            return
        epoch, start = self._place()
        if self._block is not None:  # a position that is left behind applies to no other iteration
            start = 0
        self._move(epoch, start)
        rows_at = self._rows_at(epoch)
        mine = None
        for part in slices(start, len(self), _BLOCK):
            draws = iter(rows_at(part).tolist())
            if self._block is mine:  # otherwise another iteration began, or the sampler was moved
                mine = self._block = _Block(draws, part.stop)
            yield draws

    def plan(self, epoch: int) -> NDArray[np.int64]:
        """All rows that this rank draws in one epoch, in order, int64 [len]."""
        return self._rows_at(epoch)(slice(0, len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch: a different one starts at its beginning, the same one keeps a loaded position.

        The epoch that a loaded state has just finished is not drawn again: its next iteration is empty, and the one after
        it starts the epoch that follows. ``seek(0)`` draws it again.
        """
        if not 0 <= epoch <= LAST_EPOCH - self._first_epoch:
            raise ConfigError(f"epoch must lie in 0..2**64 - 1, got {epoch}")
        self._announced = epoch + self._first_epoch
        self._empty_iterations = 0
        if self._announced == self._finished:
            self._empty_iterations = 1
        elif self._announced != self.epoch:
            self._move(self._announced, 0)

    def seek(self, position: int) -> None:
        """Let the next iteration start at this draw of the epoch, counted over all ranks.

        Raises
        ------
        ConfigError
            It lies outside the epoch, or is not a multiple of ``num_replicas``.
        """
        epoch = self._finished if self._finished is not None and self._empty_iterations else self.epoch
        self._move(epoch, self._own(position))

    def state_dict(self) -> dict[str, object]:
        """Position of the next draw as plain values that any checkpoint can store; ``position`` counts over all ranks."""
        epoch, position = self._place()
        # not compared: it tells a sampler of other weights where these are
        source = {} if self.weights_file is None else {"weighting": self.weights_file.stem}
        return {**self._identity(), **source, "epoch": epoch, "position": position * self.num_replicas}

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
            The state belongs to other weights, another method, seed, length or version of the drawing algorithm, or is not
            a sampler state.
        """
        epoch, position = state.get("epoch"), state.get("position")
        if strict and (found := _difference(self._identity(), state)):
            raise differs("sampler state", *found, epoch=epoch, hint=self._other_weights(state, *found))
        if type(epoch) is not int or type(position) is not int or not 0 <= epoch <= LAST_EPOCH:
            raise WeightsError(
                f"this is not a sampler state: epoch {epoch!r}, position {position!r}", hint="pass state_dict()"
            )
        announced = self._announced
        self._move(epoch, self._own(position))
        if self._recount_epochs:
            self._first_epoch = epoch
        elif position == 0 and epoch > 0:
            self._finished = epoch - 1
            # announced before the state came: a loader loads it. torchdata 0.11 then begins an iteration that it throws
            # away, if it has workers and the state says that the loader was finished.
            self._empty_iterations = 2 if announced == self._finished else 0

    def _other_weights(self, state: Mapping[str, object], field: str, saved: object, own: object) -> str | None:
        """How to load the weights of a state, if they are what differs."""
        if field.rpartition(".")[2] != "fingerprint" or self.weights_file is None:
            return None
        from embstore.training.published import where_saved_weights_are  # noqa: PLC0415 - only for this message

        return where_saved_weights_are(self.weights_file, state.get("weighting"), saved)

    def __getstate__(self) -> dict[str, Any]:
        """A pickled or copied sampler goes on at the next draw."""
        epoch, position = self._place()
        return {**self.__dict__, "_epoch": epoch, "_position": position, "_block": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Resumable.__init__(self)  # for what a pickle of an older version lacks
        self.__dict__.update(state)

    def _place(self) -> tuple[int, int]:
        """Epoch and this rank's position of the next draw."""
        position = self._position if self._block is None else self._block.position
        return (self._epoch, position) if position < len(self) else (self._epoch + 1, 0)

    def _move(self, epoch: int, position: int) -> None:
        """Let the next draw be this one, whatever was loaded or begun."""
        self._epoch, self._position, self._block = epoch, position, None
        self._finished, self._empty_iterations = None, 0

    def _own(self, position: int) -> int:
        """The position of this rank alone, of one that counts over all ranks."""
        if not 0 <= position < len(self) * self.num_replicas or position % self.num_replicas:
            raise ConfigError(
                f"position {position} is not a multiple of num_replicas {self.num_replicas} in "
                f"0..{len(self) * self.num_replicas - 1}",
                hint="save states at whole global batches, or resume on as many processes as before",
            )
        return position // self.num_replicas


def differs(what: str, field: str, saved: object, own: object, *, epoch: object, hint: str | None = None) -> WeightsError:
    """The error for a state or pickle that another sampler saved, in this epoch."""
    hint = hint or "make the sampler from the same store and settings as the saved run, or load with strict=False"
    if _stem(own) is not None and _stem(saved) == _stem(own):
        hint = (
            "another version of embstore saved it, and its draws are different: finish the run with that version, or start "
            f"the epoch again with a new sampler: leave out what was saved, and call set_epoch({epoch})"
        )
    return WeightsError(f"{what} differs in {field}: saved {saved!r}, here {own!r}", hint=hint)


def _stem(algorithm: object) -> str | None:
    """The method in the name of a drawing algorithm, such as ``systematic-3``."""
    stem, dash, number = str(algorithm).rpartition("-")
    return stem if dash and number.isdigit() else None


def _difference(
    own: Mapping[str, object], saved: Mapping[str, object], within: str = ""
) -> tuple[str, object, object] | None:
    """The first field that differs, and what it is there and here; fields of a sampler inside have its name before a dot."""
    for field, value in own.items():
        other = saved.get(field)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if found := _difference(value, other, f"{within}{field}."):
                return found
        elif other != value:
            return within + field, other, value
    return None
