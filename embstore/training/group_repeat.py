"""GroupRepeat: density draws in the order that group-based trainers (GRPO, RLOO) expect.

TRL's own sampler repeats each prompt ``num_generations`` times, and each batch of prompts for every step that uses its
generations; a plain weighted sampler would mix different prompts within a group.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.errors import ConfigError
from embstore.training.resumable import Resumable
from embstore.training.sampler import DensitySampler


class GroupRepeat(Resumable):
    """Repeats a sampler's draws as TRL's ``RepeatSampler`` repeats its own, and resumes at any position.

    The draws are split into batches of ``prompts_per_batch``. Each batch is repeated ``repeat_count`` times, and within it
    each draw is repeated ``group_size`` times in a row. A short last batch is dropped.

    Parameters
    ----------
    sampler
        The draws to repeat; if it is rank-aware, those of this rank.
    group_size
        Generations per prompt (TRL: num_generations).
    prompts_per_batch
        Prompts per generation batch (TRL: generation_batch_size // num_generations).
    repeat_count
        Steps on the same generations (TRL: num_iterations * steps_per_generation).

    Raises
    ------
    ConfigError
        A number is below 1, or an epoch is shorter than one batch.
    """

    def __init__(self, sampler: DensitySampler, group_size: int, prompts_per_batch: int = 1, repeat_count: int = 1) -> None:
        super().__init__(recount_epochs=sampler.recount_epochs)
        if min(group_size, prompts_per_batch, repeat_count) < 1:
            raise ConfigError(
                f"group_size, prompts_per_batch and repeat_count must be at least 1, got {group_size}, {prompts_per_batch}, "
                f"{repeat_count}"
            )
        if len(sampler) < prompts_per_batch:
            raise ConfigError(
                f"an epoch of {len(sampler)} draws is shorter than a batch of prompts_per_batch {prompts_per_batch}",
                hint="give the sampler more num_samples, or the trainer a smaller generation batch",
            )
        self._sampler = sampler
        self._group_size, self._prompts, self._repeats = group_size, prompts_per_batch, repeat_count

    def __len__(self) -> int:
        return len(self._sampler) // self._prompts * self._prompts * self._group_size * self._repeats

    @property
    def num_replicas(self) -> int:
        """Ranks that share the draws of an epoch, as in the sampler."""
        return self._sampler.num_replicas

    @property
    def weights_file(self) -> Path | None:
        """The file of a store that the sampler's weights come from; None if they come from elsewhere."""
        return self._sampler.weights_file

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch, here and in the sampler."""
        super().set_epoch(epoch)
        self._sampler.set_epoch(self.epoch)

    def _rows_at(self, epoch: int) -> Callable[[slice], NDArray[np.int64]]:
        drawn = self._sampler.plan(epoch)
        batch = self._prompts * self._group_size

        def rows(own: slice) -> NDArray[np.int64]:
            position = np.arange(own.start, own.stop)
            batch_index = position // (batch * self._repeats)
            found: NDArray[np.int64] = drawn[batch_index * self._prompts + position % batch // self._group_size]
            return found

        return rows

    def _identity(self) -> dict[str, object]:
        return {
            "group_size": self._group_size,
            "prompts_per_batch": self._prompts,
            "repeat_count": self._repeats,
            "sampler": {
                name: value
                for name, value in self._sampler.state_dict().items()
                if name not in ("weighting", "epoch", "position")
            },
        }
