"""Trainers that take a sampler, or whose order can be set otherwise. Part of the table ``trainers``."""

from __future__ import annotations

from embstore.training.trainer_entry import Trainer, Trap

WITH_HOOK: tuple[Trainer, ...] = (
    Trainer(
        name="accelerate",
        title="accelerate",
        versions="1.15",
        hook="`DataLoader(sampler=...)`, then `accelerator.prepare(loader)`",
        joined_by="content or an id, in the dataset of the loader",
        order="the plan, dealt to the processes batch by batch, with all settings of DataLoaderConfiguration",
        resume="`loader.set_epoch(epoch)`, then `skip_first_batches`, or a stateful loader with save_state and load_state",
        traps=(
            Trap(
                "accelerate splits the sampler itself: one with a rank is split twice, and a third of the draws or more "
                "never comes. Leave `rank` and `num_replicas` out.",
                "tests/trainers/test_loaders.py::test_a_sampler_that_knows_its_rank_is_split_twice_by_accelerate",
            ),
            Trap(
                "A restored loader counts epochs from 0, and the loaded place is then discarded: call "
                "`loader.set_epoch(epoch)` before the loop over its batches.",
                "tests/trainers/test_loaders.py::test_an_epoch_that_is_not_announced_after_a_state_was_loaded_is_drawn_anew",
            ),
            Trap(
                "With `dispatch_batches`, `skip_first_batches` must be given one batch for each process and step (not with "
                "`split_batches`), and saved states are wrong, with any sampler.",
                "tests/trainers/test_loaders.py::test_a_loader_that_dispatches_skips_too_little_and_saves_a_wrong_state",
            ),
            Trap(
                "`even_batches`, the default, fills the last step of an epoch with its first draws: choose `num_samples` as "
                "a multiple of the batch of all processes.",
                "tests/trainers/test_loaders.py::test_a_last_batch_that_is_not_whole_is_filled_with_the_first_draws",
            ),
        ),
    ),
    Trainer(
        name="axolotl",
        title="axolotl",
        versions="0.19",
        hook="`plugins: [embstore.integrations.axolotl.DensityPlugin]` and `embstore_store:` in the YAML",
        joined_by="content or an id column, in the rows that axolotl has kept",
        order="as the trainer's own sampler repeats its rows: whole groups in GRPO",
        resume="the trainer skips what it has trained on; the plugin sets the epoch",
        traps=(
            Trap(
                "A plugin that cannot be imported is only logged, its keys are dropped, and the run is uniform: look for "
                "'Plugin loaded successfully' in the output.",
                "tests/trainers/test_axolotl.py::"
                "test_a_plugin_that_cannot_be_imported_is_only_logged_and_its_keys_are_dropped",
            ),
            Trap(
                "SFT keeps nothing of a row but its tokens, so it cannot be joined: give axolotl tokenized rows with an id "
                "column, or a file of draws.",
                "tests/trainers/test_axolotl.py::test_prompts_survive_for_rl_and_only_tokens_for_sft",
            ),
            Trap(
                "`sample_packing` packs rows with another sampler, and is refused: it takes a file of draws.",
                "tests/trainers/test_axolotl.py::test_sample_packing_is_refused",
            ),
            Trap(
                "`trl.use_data_producer` and `trl.async_prefetch` take prompts past the loader, and are refused.",
                "tests/trainers/test_axolotl.py::test_a_producer_of_prompts_beside_the_loader_is_refused",
            ),
            Trap(
                "GRPO with `context_parallel_size` above 1 splits its sampler by rank, and is refused.",
                "tests/trainers/test_axolotl.py::test_context_parallelism_is_refused",
            ),
        ),
    ),
    Trainer(
        name="lightning",
        title="Lightning",
        versions="2.6",
        hook="`DataLoader(sampler=...)`; on several processes with a rank, and `Trainer(use_distributed_sampler=False)`",
        joined_by="content or an id, in the dataset of the loader",
        order="the plan; Lightning announces each epoch to the sampler",
        resume="exact at every step with torchdata's StatefulDataLoader, whose place is in Lightning's checkpoint",
        traps=(
            Trap(
                "`use_distributed_sampler=True`, the default, shuffles the draws of a sampler without a rank, and fills up "
                "the last step.",
                "tests/trainers/test_lightning.py::test_its_default_keeps_the_draws_and_shuffles_them",
            ),
            Trap(
                "The same default splits a sampler with a rank again: half of the draws of two processes never come.",
                "tests/trainers/test_lightning.py::test_its_default_splits_a_sampler_that_knows_its_rank_again",
            ),
            Trap(
                "Without the default, a sampler without a rank gives every process all draws.",
                "tests/trainers/test_lightning.py::"
                "test_without_the_default_a_sampler_without_a_rank_gives_every_process_all_draws",
            ),
            Trap(
                "A plain DataLoader is not resumed inside an epoch: other draws follow.",
                "tests/trainers/test_lightning.py::test_a_loader_without_states_begins_the_epoch_again",
            ),
        ),
    ),
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
                "Groups that wait in slime's buffer, such as those of partial rollouts, are not saved: a resumed run skips "
                "their draws.",
                test="tests/oracle/test_slime.py::test_slime_does_not_save_the_groups_in_its_buffer",
            ),
        ),
    ),
    Trainer(
        name="torch",
        title="torch DataLoader and DDP",
        versions="2.6 to 2.13, torchdata 0.11",
        hook='`DataLoader(sampler=DensitySampler(weights, rank="auto"))`',
        joined_by="content or an id, in the dataset of the loader",
        order="the plan; with a rank, the processes take its draws in turn",
        resume="exact with the state of torchdata's StatefulDataLoader, or by counting steps",
        traps=(
            Trap(
                '`rank="auto"` finds the rank of a process group that exists: a sampler that is made before '
                "`init_process_group` is not split.",
                "tests/oracle/test_trainers_order.py::test_a_rank_is_not_found_before_the_process_group_is_made",
            ),
            Trap(
                "With workers, the sampler's own state is ahead of the batches that were trained on: take the loader's.",
                "tests/oracle/test_trainers_order.py::test_with_workers_the_state_of_the_sampler_is_ahead_of_the_batches",
            ),
        ),
    ),
    Trainer(
        name="transformers",
        title="transformers Trainer",
        versions="4.57 to 5.24",
        hook="`attach(trainer, weights)`, or the mixin `DensitySampling`",
        joined_by="content or an id column, in `trainer.train_dataset`",
        order="each draw once; a last batch that would not be whole on all processes is left out",
        resume="the trainer skips what it has trained on; attach sets the epoch",
        traps=(
            Trap(
                "An order that was asked for (`train_sampling_strategy` other than random, `group_by_length`) is not "
                "replaced: attach refuses it.",
                "tests/oracle/test_trl_attach.py::test_an_order_that_was_asked_for_is_not_replaced",
            ),
            Trap(
                "With `ignore_data_skip=True`, the trainer begins an epoch again after a resume inside it: attach refuses "
                "that. Leave it False: skipped rows are not read.",
                "tests/oracle/test_trl_attach.py::test_a_resume_that_skips_nothing_is_refused_inside_an_epoch",
            ),
            Trap(
                "A stream has no rows to draw: resample it first.",
                "tests/oracle/test_trl_attach.py::test_a_stream_is_refused",
            ),
        ),
    ),
    Trainer(
        name="trl",
        title="TRL",
        versions="0.24 to 1.16",
        hook="`attach(trainer, weights)`, or the mixin `DensitySampling`",
        joined_by="content or an id column, in the rows that the trainer has kept",
        order="as the trainer's own sampler repeats its rows: whole groups, for all steps that use a generation",
        resume="the trainer skips what it has trained on; attach sets the epoch",
        traps=(
            Trap(
                "SFT, DPO, Reward and KTO drop rows that are too long: weights that were joined before are refused. Pass "
                "`load_weights(STORE)` itself.",
                "tests/oracle/test_trl_attach.py::test_weights_that_were_joined_before_rows_were_dropped_are_refused",
            ),
            Trap(
                "A trainer may rewrite the column with the prompt (DPO of TRL 0.24 renders chats): give the dataset a "
                "column with the ids of the store, and pass `id_column`.",
                "tests/oracle/test_trl_attach.py::test_a_prompt_that_the_trainer_has_rewritten_needs_ids",
            ),
            Trap(
                "Rows that SFT has packed have no prompt: resample the dataset before it is packed.",
                "tests/oracle/test_trl_attach.py::test_packed_rows_have_no_prompt",
            ),
            Trap(
                "KTO estimates its KL term from neighbours in the dataset's order: it is refused, unless "
                "`loss_type='apo_zero_unpaired'` switches the term off.",
                "tests/oracle/test_trl_attach.py::test_kto_is_refused_while_it_has_a_kl_term",
            ),
            Trap(
                "AsyncGRPO and AsyncDistillation do not ask for a sampler: they stop before their first step. Give them a "
                "resampled dataset.",
                "tests/oracle/test_trl_classes.py::test_asynchronous_trainers_stop_before_their_first_step",
            ),
            Trap(
                "A2PO drops prompts inside `train()`, and its dataset is then refused: `filter_all_incorrect=False` keeps "
                "them.",
                "tests/oracle/test_trl_classes.py::test_a2po_keeps_its_prompts_only_without_its_filter",
            ),
            Trap(
                "TRL forgets which part of a generated batch comes next: save at multiples of "
                "`steps_per_generation * num_iterations` micro-batches. Other `save_steps` cause a warning.",
                "tests/oracle/test_trl.py::test_checkpoints_inside_a_generated_batch_are_warned_of",
            ),
        ),
    ),
    Trainer(
        name="unsloth",
        title="unsloth",
        versions="2026.10",
        hook="`attach(trainer, weights)` on the trainer of TRL that unsloth has patched",
        joined_by="content or an id column, in the rows that the trainer has kept",
        order="as in TRL",
        resume="the trainer skips what it has trained on; attach sets the epoch",
        traps=(
            Trap(
                "SFT appends the token that ends a text to the column itself, and the text no longer joins: give the "
                "dataset a column with the ids of the store, and pass `id_column`.",
                "tests/trainers/test_unsloth.py::test_the_page_trains_and_its_texts_have_another_end",
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
