"""Trainers that read a file of draws, which ``embstore resample`` writes. Part of the table ``trainers``."""

from __future__ import annotations

from embstore.training.trainer_entry import Trainer, Trap

WITH_FILE: tuple[Trainer, ...] = (
    Trainer(
        name="areal",
        title="AReaL",
        versions="1.0",
        hook="a file by `embstore resample`, with `shuffle: false`",
        joined_by="the prompt, when the file is drawn",
        order="that of the file, in one pass",
        resume="goes on with the row after the last one that was handed out",
        traps=(
            Trap(
                "With the default `shuffle: true` the file's order is lost, and after a resume in a later pass AReaL counts "
                "passes from 0 again: it reads the rest of the first pass. Draw the whole run and train for one epoch.",
                "tests/trainers/test_areal.py::test_with_shuffle_a_resumed_second_pass_is_another_one",
            ),
            Trap(
                "A `DensitySampler` in AReaL's loader needs `recount_epochs=True`: without it, passes are drawn again after "
                "a resume.",
                "tests/trainers/test_areal.py::test_a_sampler_needs_recount_epochs",
            ),
        ),
    ),
    Trainer(
        name="llama-factory",
        title="LLaMA-Factory",
        versions="0.9.5",
        hook="a file by `embstore resample`, with `disable_shuffling: true`",
        joined_by="the prompt, when the file is drawn",
        order="that of the file, in each epoch again",
        resume="replays the order and skips what was done",
        traps=(
            Trap(
                "Without `disable_shuffling: true` the rows are shuffled: each draw is trained on, in another order.",
                "tests/trainers/test_llama_factory.py::test_without_disable_shuffling_the_rows_are_the_same_in_another_order",
            ),
            Trap(
                "With `streaming: true` the rows are shuffled in spite of `disable_shuffling`.",
                "tests/trainers/test_llama_factory.py::test_a_stream_is_shuffled_in_spite_of_disable_shuffling",
            ),
            Trap(
                "A second epoch trains on the same draws in the same order: draw the whole run for one epoch.",
                "tests/trainers/test_llama_factory.py::test_a_second_epoch_repeats_the_draws",
            ),
        ),
    ),
    Trainer(
        name="ms-swift",
        title="ms-swift",
        versions="4.6",
        hook="a file by `embstore resample`, with `--dataset_shuffle false` and `--train_dataloader_shuffle false`",
        joined_by="the prompt, when the file is drawn",
        order="that of the file, in each epoch again; GRPO has groups of it",
        resume="skips what was done",
        traps=(
            Trap(
                "Either of the two settings alone leaves the rows shuffled.",
                "tests/trainers/test_ms_swift.py::test_either_setting_alone_leaves_the_rows_shuffled",
            ),
            Trap(
                "Rows longer than `--max_length` are left out after the file was read, so the run is shorter than planned.",
                "tests/trainers/test_ms_swift.py::test_rows_that_are_too_long_are_left_out_and_the_run_is_shorter",
            ),
            Trap(
                "`--rlhf_type kto` shuffles the rows whatever the settings are.",
                "tests/trainers/test_ms_swift.py::test_kto_shuffles_whatever_the_settings_are",
            ),
        ),
    ),
    Trainer(
        name="open-instruct",
        title="open-instruct",
        versions="commit e6c3044aa",
        hook="a file by `embstore resample`, named in `--dataset_mixer_list`",
        joined_by="the prompt, when the file is drawn",
        order="shuffled by open-instruct; each draw once a pass",
        resume="makes the same shuffled order and goes on in it",
        traps=(
            Trap(
                "The cache of tokenized datasets follows the file's name and not its content: give each file that you draw "
                "another name.",
                "tests/oracle/test_recipes.py::test_open_instruct_takes_an_older_file_of_the_same_name_from_its_cache",
            ),
            Trap(
                "A sampler that repeats rows would mix up their answers, because requests are named by epoch and row: use a "
                "file, in which each draw is a row.",
                "tests/oracle/test_recipes.py::test_open_instruct_would_mix_up_what_a_repeating_sampler_draws_twice",
            ),
        ),
    ),
    Trainer(
        name="openrlhf",
        title="OpenRLHF",
        versions="0.11",
        hook="a file by `embstore resample`, as `--data.prompt_dataset`",
        joined_by="the prompt, when the file is drawn",
        order="shuffled by OpenRLHF; each draw once an episode",
        resume="goes on in the shuffled order",
        traps=(
            Trap(
                "The order of the file is not kept: OpenRLHF always shuffles.",
                "tests/trainers/test_openrlhf.py::test_the_order_of_the_file_is_not_kept",
            ),
            Trap(
                "A second episode trains on the same draws: draw the whole run for one episode.",
                "tests/trainers/test_openrlhf.py::test_a_second_episode_has_the_same_draws",
            ),
            Trap(
                "With `--rollout.vllm_generate_batch_size` above `--rollout.batch_size`, prompts that were asked for ahead "
                "are not trained on after a resume.",
                "tests/trainers/test_openrlhf.py::test_prompts_that_were_asked_for_ahead_are_lost_at_a_stop",
            ),
        ),
    ),
    Trainer(
        name="prime-rl",
        title="prime-rl",
        versions="commit 559b44772",
        hook="a file by `embstore resample`, read by the taskset of an environment",
        joined_by="the prompt, when the file is drawn",
        order="that of the file, and from its beginning again",
        resume="goes on with the next task",
        traps=(
            Trap(
                "Two draws of one row with the same task key are refused: build the key from `embstore_draw`, or renumber "
                "its column with `--reindex`.",
                "tests/oracle/test_recipes.py::test_prime_rl_refuses_two_draws_with_one_key",
            ),
        ),
    ),
    Trainer(
        name="roll",
        title="ROLL",
        versions="commit 8eb27cc2",
        hook="a file for each domain by `embstore resample`, in `data_args.file_name`",
        joined_by="the prompt, when the file is drawn",
        order="shuffled by ROLL; each draw once a pass",
        resume="takes as many rows again as were taken before",
        traps=(
            Trap(
                "The share of a domain is that of `domain_interleave_probs`, whatever was drawn: one file of all domains is "
                "not trained on as it was drawn, so draw from each domain by itself.",
                "tests/oracle/test_recipes.py::test_roll_takes_the_share_of_a_domain_from_its_settings",
            ),
        ),
    ),
)
