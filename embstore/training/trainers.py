"""The trainers that embstore was tried with: where the order of prompts comes from, how rows are joined, what to beware of.

One table: ``embstore doctor`` prints it, and the pages in ``docs/train/`` show it together with what was tested. It is only
data, so that neither needs an installed trainer.
"""

from __future__ import annotations

from dataclasses import dataclass

from embstore.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Trap:
    """What goes wrong in silence with a trainer's own settings, and what to do. ``test``: the pytest node that shows it."""

    text: str
    test: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """One framework.

    ``name`` is what ``embstore doctor --trainer`` takes, and the name of its page; ``versions`` are those with this hook.
    """

    name: str
    title: str
    versions: str
    hook: str
    joined_by: str
    order: str
    resume: str
    traps: tuple[Trap, ...] = ()


TRAINERS: tuple[Trainer, ...] = (
    Trainer(
        name="nanochat",
        title="nanochat",
        versions="commit 92d63d4",
        hook="two lines in scripts/chat_rl.py",
        joined_by="the first user message of each example",
        order="one plan for the run; each rank takes its share of every step",
        resume="nanochat does not resume",
        traps=(
            Trap(
                "A row that is drawn twice in one step gets one seed, so its rollouts are identical: set no_repeat_within "
                "to args.examples_per_step.",
                test="tests/unit/test_draws.py::test_nanochat_gives_a_row_that_is_drawn_twice_in_a_step_the_same_rollouts",
            ),
        ),
    ),
    Trainer(
        name="nemo-rl",
        title="NeMo-RL",
        versions="commit 7ea279a",
        hook="data.train.dataset_name, a dataset of the drawn prompts",
        joined_by="the chat without its answer; or key_column, id_column",
        order="one plan for the run, in order if data.shuffle=false",
        resume="the loader's state in train_dataloader.pt continues exactly",
        traps=(
            Trap(
                "Equal prompts of one step become one group, with one baseline: set density.no_repeat_within to "
                "grpo.num_prompts_per_step.",
                test="tests/oracle/test_nemo_rl.py::test_nemo_rl_merges_the_groups_of_a_prompt_that_is_drawn_twice_in_a_step",
            ),
            Trap(
                "data.shuffle=true trains on each draw once, but in another order, and repeats meet in one step again.",
                test="tests/oracle/test_nemo_rl.py::test_nemo_rl_must_not_shuffle_the_draws",
            ),
            Trap(
                "Every pass over the dataset has the same draws: set density.num_samples to those of the whole run.",
                test="tests/oracle/test_nemo_rl.py::test_every_pass_of_nemo_rl_is_the_same_plan",
            ),
        ),
    ),
    Trainer(
        name="skyrl",
        title="SkyRL",
        versions="0.3.0",
        hook="SFT: sampler_class_path; RL: a file of embstore resample",
        joined_by="SFT: source or keys, because the items are tokens; RL: the prompt",
        order="SFT: the plan, each pass with its own draws; RL: the draws of the file, shuffled by SkyRL",
        resume="the loader's state in data.pt continues exactly",
        traps=(
            Trap(
                "RL knows a prompt by the number of its row: with a sampler that repeats rows, groups are merged, and fully "
                "async training fails. In a resampled file each draw is a row.",
                test="tests/trainers/test_skyrl.py::test_skyrl_rl_merges_the_groups_of_a_row_that_comes_twice",
            ),
            Trap(
                "RL always shuffles its file: each draw is trained on once a pass, but repeats may meet in one step.",
                test="tests/trainers/test_skyrl.py::test_skyrl_rl_shuffles_a_resampled_file",
            ),
            Trap(
                "SFT drops rows whose answer is missing or cut off; then a source has other rows, and is refused: drop "
                "these rows from the file, or name the keys of the others.",
                test="tests/trainers/test_skyrl.py::test_skyrl_sft_hands_over_tokens_and_drops_rows",
            ),
        ),
    ),
    Trainer(
        name="slime",
        title="slime",
        versions="commit 624b824 (0.3.1)",
        hook="--data-source-path, with --rollout-shuffle",
        joined_by="the prompt; rendered ones by an id in their metadata",
        order="the plan, each pass with its own draws",
        resume="slime's own place, a pass and an offset, continues exactly; other weights are refused",
        traps=(
            Trap(
                "Prompts that --apply-chat-template rendered are not those of a store: name the field with their ids, "
                "density.id_column.",
                test="tests/oracle/test_slime.py::test_what_slime_cannot_order_is_refused",
            ),
        ),
    ),
    Trainer(
        name="verl",
        title="verl",
        versions="0.7 to 0.9",
        hook="VERL_USE_EXTERNAL_MODULES=embstore.integrations.verl and +data.density.store",
        joined_by="data.prompt_key, in the dataset after verl's length filter",
        order="the plan, with other draws in each epoch; data.shuffle does not matter",
        resume="the loader's state in data.pt continues exactly, also between epochs",
        traps=(
            Trap(
                "verl ignores data.density where the variable does not reach the Ray actor that makes the loader: its "
                "output must say 'embstore: an epoch is'.",
                test="tests/trainers/test_verl.py::test_verl_ignores_the_settings_without_the_variable",
            ),
            Trap(
                "Since 0.9 trainer.total_epochs counts the rows of the dataset, not num_samples: set "
                "trainer.total_training_steps, too.",
                test="tests/trainers/test_verl.py::test_the_newer_trainer_counts_an_epoch_by_the_rows_of_the_dataset",
            ),
            Trap(
                "In a file of embstore resample, verl drops the draws of prompts that are too long, and the run is shorter "
                "than planned: --over draws spare ones.",
                test="tests/trainers/test_verl.py::test_a_file_of_draws_loses_those_of_rows_that_verl_drops",
            ),
            Trap(
                "The trainer for SFT ignores data.density, and shuffles its file: embstore resample gives it the draws, in "
                "another order.",
                test="tests/trainers/test_verl.py::test_the_trainer_of_sft_ignores_the_settings_and_shuffles_a_file",
            ),
        ),
    ),
)


def trainer_of(name: str) -> Trainer:
    """The entry of this name.

    Raises
    ------
    ConfigError
        There is none.
    """
    for each in TRAINERS:
        if each.name == name:
            return each
    raise ConfigError(
        f"there is no trainer named {name!r}: {', '.join(each.name for each in TRAINERS)}",
        hint="a trainer without a name here reads a file: embstore resample",
    )
