"""Density sampling in trainers of TRL and transformers: a mixin for the sampler hook, and a callback for the epoch.

    class DensityGRPOTrainer(DensitySampling, GRPOTrainer): ...

    weights = load_weights("STORE").for_dataset(dataset)
    trainer = DensityGRPOTrainer(..., train_dataset=dataset, density_sampler=DensitySampler(weights, seed=0))

Trainers that draw groups (GRPO, RLOO) get TRL's own order, every prompt ``num_generations`` times in a row; others (SFT,
DPO, reward models, ``transformers.Trainer``) get each draw once. accelerate splits one global order among the processes, so
the sampler must not be rank-aware. On a resume, a trainer replays the epoch to skip what it has trained on, which is exact
because the order is a function of seed and epoch. The callback sets the epoch, because after a resume inside an epoch
nothing else does so on several processes (seen with TRL 1.16, transformers 5.24 and accelerate 1.15).
"""

from __future__ import annotations

import warnings
from collections.abc import Sized
from typing import Any

from transformers import TrainerCallback

from embstore.core.errors import ConfigError, LengthMismatchError
from embstore.training import DensitySampler, GroupRepeat


class EpochCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Sets the sampler to the beginning of each epoch before it starts, whatever was drawn before.

    The epoch is computed from the optimizer steps done, as the trainer does, so it is right after any resume. ``sampler`` is
    the one that the trainer's loader iterates; the mixin keeps it up to date.
    """

    def __init__(self, sampler: DensitySampler | GroupRepeat | None = None) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """The trainer calls this with its dataloader as ``train_dataloader``."""
        if self.sampler is None:
            return  # the trainer did not create its loader through the hook
        steps = max(1, -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps))
        self.sampler.set_epoch(state.global_step // steps)
        self.sampler.seek(0)  # the trainer itself skips what was trained on, counting from the epoch's first draw


class DensitySampling:
    """Mixin for a trainer class, listed before it: ``density_sampler`` draws the prompts.

    Parameters
    ----------
    density_sampler
        A sampler over the weights of ``train_dataset``, in its order; rank-agnostic (``num_replicas=1``). Its seed, not the
        trainer's, decides the order. All other arguments go to the trainer.

    Raises
    ------
    ConfigError
        The dataset is a stream, which cannot be sampled, or the sampler is already split by rank.
    """

    train_dataset: Any
    args: Any

    def __init__(self, *args: Any, density_sampler: DensitySampler, **kwargs: Any) -> None:  # noqa: ANN401
        if density_sampler.num_replicas != 1:
            raise ConfigError(
                f"the sampler is split into {density_sampler.num_replicas} ranks, and the trainer would split it again",
                hint="leave num_replicas at 1: every process must see the same order",
            )
        self.density_sampler = density_sampler
        self._epoch_callback = EpochCallback()
        super().__init__(*args, **kwargs)
        if not isinstance(self.train_dataset, Sized):
            raise ConfigError(
                f"{type(self.train_dataset).__name__} has no length: a stream cannot be sampled",
                hint="give the trainer a map-style dataset, or resample it first: embstore resample",
            )
        self.add_callback(self._epoch_callback)  # type: ignore[attr-defined]  # the trainer's

    def _get_train_sampler(self, dataset: Sized | None = None) -> GroupRepeat:
        """The trainers' hook; ``dataset`` may lack columns, so only its length is used.

        Raises
        ------
        LengthMismatchError
            The dataset has another length than the weights.
        ConfigError
            The sampler's epoch is shorter than one batch of all processes.
        """
        rows = len(self.train_dataset if dataset is None else dataset)
        if rows != self.density_sampler.num_rows:
            raise LengthMismatchError(
                f"the sampler is over {self.density_sampler.num_rows} weights, the trainer's dataset has {rows} rows",
                hint="a trainer may filter or pack: call Weights.for_dataset with the dataset that it really uses",
            )
        args = self.args
        if hasattr(self, "num_generations"):
            group, repeat = self.num_generations, self.num_iterations * args.steps_per_generation  # type: ignore[attr-defined]
            prompts = args.generation_batch_size // group
            self._warn_of_unaligned_saves(repeat)
        else:
            group, repeat = 1, 1
            # whole batches only: accelerate would fill the last one with the first rows of the epoch
            prompts = args.train_batch_size * args.world_size
        groups = GroupRepeat(self.density_sampler, group_size=group, prompts_per_batch=prompts, repeat_count=repeat)
        self._epoch_callback.sampler = groups
        return groups

    def _warn_of_unaligned_saves(self, repeat: int) -> None:
        """Warn if checkpoints fall inside a generated batch: on a resume, TRL forgets which part of it comes next."""
        args = self.args
        # save_steps below 1 is a share of the run, which is known only after the start
        saves_by_steps = args.save_strategy == "steps" and args.save_steps >= 1
        if saves_by_steps and (args.save_steps * args.gradient_accumulation_steps) % repeat:
            warnings.warn(
                f"save_steps={args.save_steps} falls inside a generated batch, which is used for {repeat} micro-batches; "
                "a run that is resumed there trains on different slices than an uninterrupted one",
                stacklevel=2,
            )
