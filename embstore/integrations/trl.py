"""Density sampling in trainers of TRL and transformers, and of frameworks that build on them.

    trainer = attach(GRPOTrainer(..., train_dataset=dataset), load_weights("STORE"), seed=0)

    class DensityGRPOTrainer(DensitySampling, GRPOTrainer): ...  # the same, for code that makes trainers from a class

``attach`` replaces the sampler hook of a trainer object, and joins the weights to the rows that the trainer has kept. The
trainer's own sampler is asked how draws are repeated: trainers that generate (GRPO, RLOO, distillation) use a batch of
prompts for several steps, and context parallelism divides it. accelerate splits one global order among the processes, so the
sampler must not be split by rank.

On a resume, a trainer replays the epoch to skip what it has trained on, which is exact because the order is a function of
seed and epoch. The hook sets the epoch, because after a resume inside an epoch nothing else does so on several processes
(seen with TRL 1.16, transformers 5.24 and accelerate 1.15).
"""

from __future__ import annotations

import warnings
from collections.abc import Sized
from typing import Any

from numpy.typing import ArrayLike
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import TrainerCallback

from embstore.core.errors import ConfigError, KeyMismatchError, LengthMismatchError
from embstore.training import DensitySampler, GroupRepeat, Weights

_RESAMPLE = "resample the dataset instead: embstore resample for a file, embstore.training.resample_dataset for a dataset"
_BESIDE_THE_LOADER = ("data_producer", "_prompt_iter")  # where axolotl's asynchronous GRPO takes its prompts from


def attach(
    trainer: Any,  # noqa: ANN401 - of any class
    weights: Weights | DensitySampler | ArrayLike,
    *,
    id_column: str | None = None,
    key_column: str | None = None,
    **sampler_options: Any,  # noqa: ANN401 - those of DensitySampler
) -> Any:  # noqa: ANN401 - the trainer
    """Let a trainer draw its training rows by density; returns the trainer.

    Parameters
    ----------
    trainer
        A trainer of TRL, of transformers, or of a framework on top of them, before it trains.
    weights
        ``load_weights(STORE)``, which is joined to ``trainer.train_dataset`` here, so that rows that the trainer has dropped
        do not count; or weights in the order of that dataset: joined ones, or a vector; or a ``DensitySampler`` over such.
    id_column, key_column
        For the join: see ``Weights.for_dataset``. A trainer may rewrite the column with the prompt; other columns stay.
    sampler_options
        Of ``DensitySampler``, as ``seed`` or ``num_samples``. This seed, not the trainer's, decides the order.

    Raises
    ------
    LengthMismatchError, KeyMismatchError
        The weights do not fit the trainer's dataset.
    ConfigError
        The dataset is a stream, which cannot be sampled; the trainer depends on its own order, or takes its prompts from
        elsewhere; the sampler is split by rank; or the trainer has density sampling already.
    """
    _refuse(trainer)
    sampler = _sampler(trainer, weights, id_column, key_column, sampler_options)
    _refuse_split(sampler)
    _check_length(trainer.train_dataset, sampler)
    hook = SamplerHook(trainer, sampler)
    trainer._get_train_sampler = hook
    trainer.add_callback(hook)
    return trainer


class DensitySampling:
    """Mixin for a trainer class, listed before it.

    Parameters
    ----------
    density_sampler
        What ``attach`` takes: a ``DensitySampler`` over the weights of ``train_dataset`` in its order, or weights. All other
        arguments go to the trainer.

    Raises
    ------
    LengthMismatchError, KeyMismatchError, ConfigError
        See ``attach``.
    """

    def __init__(self, *args: Any, density_sampler: DensitySampler | Weights | ArrayLike, **kwargs: Any) -> None:  # noqa: ANN401
        if isinstance(density_sampler, DensitySampler):
            _refuse_split(density_sampler)  # before a model is loaded
        super().__init__(*args, **kwargs)
        attach(self, density_sampler)


class SamplerHook(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Stands in for ``trainer._get_train_sampler``, and keeps the order at the trainer's epoch; ``attach`` makes it.

    ``order`` is what the trainer's loader iterates; None until the trainer has asked for it.
    """

    def __init__(self, trainer: Any, sampler: DensitySampler) -> None:  # noqa: ANN401
        self._trainer, self._sampler = trainer, sampler
        self._own_hook = trainer._get_train_sampler
        self._pattern: tuple[int, int, int] | None = None
        self._untouched: dict[str, object] | None = None  # the state at the beginning of an epoch, until its first step
        self.order: GroupRepeat | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> GroupRepeat:  # noqa: ANN401 - older trainers pass no dataset
        """The order; a dataset that is passed may lack columns, so only its length is used.

        Raises
        ------
        LengthMismatchError
            The dataset has another length than the weights.
        ConfigError
            The trainer depends on its own order, or the sampler's epoch is shorter than one batch of all processes.
        """
        passed = [dataset for dataset in (*args, *kwargs.values()) if dataset is not None]
        _check_length(passed[0] if passed else self._trainer.train_dataset, self._sampler)
        pattern = _pattern(self._trainer, self._own_hook(*args, **kwargs))
        if self.order is None or pattern != self._pattern:  # several loaders share one order, and its epoch
            self._pattern, self.order = pattern, GroupRepeat(self._sampler, *pattern)
        _warn_of_unaligned_saves(self._trainer.args, pattern[2])
        return self.order

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """The trainer has made its loader: refuse one that was made without the hook."""
        if self.order is None:
            raise ConfigError(
                f"{type(self._trainer).__name__} did not ask for a sampler: it would train without the weights",
                hint=_RESAMPLE,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Move the order to where the trainer is, whatever was drawn before.

        The epoch is computed from the optimizer steps done, as the trainer does, so it is right after any resume.
        """
        if self.order is None:
            return
        batches = len(kwargs["train_dataloader"])
        epoch, step = divmod(state.global_step, max(1, -(-batches // args.gradient_accumulation_steps)))
        if step and args.ignore_data_skip:
            raise ConfigError(
                f"ignore_data_skip=True would draw epoch {epoch} from its beginning again, of which {step} steps are done",
                hint="leave ignore_data_skip at False: what is skipped is not read",
            )
        self.order.set_epoch(epoch)
        self.order.seek(0)  # the trainer itself skips what it has trained on, counting from the epoch's first draw
        self._untouched = self.order.state_dict()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """The trainer has fetched the batches of a step: refuse one that took them from elsewhere."""
        # with dispatch_batches only the first process reads the loader
        if self.order is not None and state.is_world_process_zero and self._untouched == self.order.state_dict():
            raise ConfigError(
                f"{type(self._trainer).__name__} asked for a sampler and drew nothing from it: it would train without the "
                "weights",
                hint=_RESAMPLE,
            )
        self._untouched = None


def _refuse(trainer: Any) -> None:  # noqa: ANN401
    """Refuse a trainer whose rows cannot or must not come in another order."""
    name = type(trainer).__name__
    if any(isinstance(callback, SamplerHook) for callback in trainer.callback_handler.callbacks):
        raise ConfigError(f"this {name} has density sampling already", hint="attach once, or use the mixin and not attach")
    if not isinstance(trainer.train_dataset, Sized):
        raise ConfigError(
            f"train_dataset is of type {type(trainer.train_dataset).__name__} and has no length: a stream cannot be sampled",
            hint="give the trainer a map-style dataset, or resample it first: embstore resample",
        )
    if getattr(trainer, "calculate_KL", False):
        raise ConfigError(
            f"{name} estimates its KL term from neighbours of the dataset: another order would change its loss",
            hint="loss_type='apo_zero_unpaired' has no KL term; otherwise, resample the dataset before the trainer is made",
        )
    for source in _BESIDE_THE_LOADER:
        if getattr(trainer, source, None) is not None:
            raise ConfigError(
                f"{name} takes its prompts from {source}, not from its loader: it would train without the weights",
                hint=f"switch asynchronous generation off, or {_RESAMPLE}",
            )


def _refuse_split(sampler: DensitySampler) -> None:
    if sampler.num_replicas != 1:
        raise ConfigError(
            f"the sampler is split into {sampler.num_replicas} ranks, and the trainer would split it again",
            hint="leave num_replicas at 1: every process must see the same order",
        )


def _check_length(dataset: Sized, sampler: DensitySampler) -> None:
    if len(dataset) != sampler.num_rows:
        raise LengthMismatchError(
            f"the sampler is over {sampler.num_rows} weights, the trainer's dataset has {len(dataset)} rows",
            hint="a trainer may drop or pack rows: attach(trainer, load_weights(STORE)) joins to those that it has kept",
        )


def _sampler(
    trainer: Any,  # noqa: ANN401
    weights: Weights | DensitySampler | ArrayLike,
    id_column: str | None,
    key_column: str | None,
    options: dict[str, Any],
) -> DensitySampler:
    """A sampler over these weights in the order of the trainer's dataset."""
    joins = id_column is not None or key_column is not None
    if isinstance(weights, Weights):
        in_order = weights.store is None or weights.order_checked or options.get("positional", False)
        if joins or not in_order:
            weights = _joined(trainer, weights, id_column, key_column)
    elif joins or (isinstance(weights, DensitySampler) and options):
        raise ConfigError(
            f"weights of type {type(weights).__name__} are taken as they are: got id_column={id_column!r}, "
            f"key_column={key_column!r}, options {sorted(options)}",
            hint="attach(trainer, load_weights(STORE), ...) takes these arguments",
        )
    return weights if isinstance(weights, DensitySampler) else DensitySampler(weights, **options)


def _joined(trainer: Any, weights: Weights, id_column: str | None, key_column: str | None) -> Weights:  # noqa: ANN401
    try:
        return weights.for_dataset(trainer.train_dataset, id_column=id_column, key_column=key_column)
    except KeyMismatchError as error:
        error.add_note(
            f"{type(trainer).__name__} may have rewritten the column with the prompt: give the dataset a column with the "
            "prompts' ids before the trainer is made, and pass id_column"
        )
        raise


def _pattern(trainer: Any, own: Any) -> tuple[int, int, int]:  # noqa: ANN401
    """How the trainer's own sampler repeats: copies of a draw in a row, draws in a batch, uses of the batch."""
    if any(hasattr(own, name) for name in ("rank", "num_replicas")):
        raise ConfigError(
            f"{type(own).__name__} of {type(trainer).__name__} splits its order by rank, and draws are one order",
            hint=f"no context parallelism and no train_sampling_strategy='batch_rebalance', or {_RESAMPLE}",
        )
    if hasattr(own, "mini_repeat_count"):
        return own.mini_repeat_count, own.batch_size, own.repeat_count
    # KTO without its KL term keeps a sequential order that it does not need
    if isinstance(own, RandomSampler) or (isinstance(own, SequentialSampler) and hasattr(trainer, "calculate_KL")):
        # whole batches only: accelerate would fill the last one with the first rows of the epoch
        return 1, trainer._train_batch_size * trainer.args.world_size, 1
    raise ConfigError(
        f"the rows of {type(trainer).__name__} come in the order of a {type(own).__name__}, which draws would replace",
        hint="train_sampling_strategy='random' (transformers 4: group_by_length=False), and no sampler that packs rows",
    )


def _warn_of_unaligned_saves(args: Any, repeat: int) -> None:  # noqa: ANN401
    """Warn if checkpoints fall inside a generated batch: on a resume, TRL forgets which part of it comes next."""
    # save_steps below 1 is a share of the run, which is known only after the start
    saves_by_steps = args.save_strategy == "steps" and args.save_steps >= 1
    if saves_by_steps and (args.save_steps * args.gradient_accumulation_steps) % repeat:
        warnings.warn(
            f"save_steps={args.save_steps} falls inside a generated batch, which is used for {repeat} micro-batches; "
            "a run that is resumed there trains on different slices than an uninterrupted one",
            stacklevel=3,
        )
