"""OpenRLHF takes the resampled file of its page: its parser, dataset, loader, batches and loop of episodes.

Ray actors, vLLM, DeepSpeed and kernels are stood in for: nothing is generated or trained.
"""

from __future__ import annotations

import copy
import functools
import pickle
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.absent import absent
from tests.support.recipes import DRAWS, ITEMS, Recipe, number_in

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore"),  # of OpenRLHF and what it imports
]

ROWS = [{"prompt": f"Explain row {number}!", "answer": str(number)} for number in range(ITEMS)]
BATCH = 8  # of the page's command
NOT_HERE = ("aiohttp", "deepspeed", "flash_attn", "loralib", "optree", "ring_flash_attn", "vllm")


@pytest.fixture(scope="module")
def openrlhf() -> Any:
    """Its module of the trainer."""
    with absent(*NOT_HERE):
        from openrlhf.trainer import ppo_trainer

        yield ppo_trainer


class Parsed(Exception):
    """The settings of a command line."""


def settings(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the program makes of its command line: it is run until it asks for a strategy."""
    import openrlhf.utils
    import ray

    def stop(args: Any) -> None:
        raise Parsed(args)

    monkeypatch.setattr(openrlhf.utils, "get_strategy", stop)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(sys, "argv", ["train_ppo_ray", *words])
    with pytest.raises(Parsed) as parsed:
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
    return parsed.value.args[0]


class Run:
    """OpenRLHF's loop of episodes over its own loader, with prompts noted in place of training."""

    def __init__(self, module: Any, args: Any) -> None:
        from openrlhf.utils.deepspeed import DeepspeedStrategy

        strategy = SimpleNamespace(args=args, is_rank_0=lambda: True, print=lambda *said: None)
        strategy.setup_dataloader = functools.partial(DeepspeedStrategy.setup_dataloader, strategy)
        loader, _, self.max_steps = module.prepare_datasets(strategy, tokenizer=None)
        self.seen: list[list[int]] = []
        self.saved: list[bytes] = []
        run = self

        class Samples(module.SamplesGenerator):  # type: ignore[misc,name-defined]
            def _generate_vllm(self, dataloader_iter: Any, num_prompts: int, **rest: Any) -> Any:
                collect = sys.modules[module.SamplesGenerator.__module__]._collect_prompt_batch
                prompts, _, _, exhausted = collect(dataloader_iter, num_prompts)
                return prompts, len(prompts), exhausted

        class Trainer(module.PPOTrainer.__ray_metadata__.modified_class):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                self.args, self.prompts_dataloader, self.eval_dataloader = args, loader, None
                self.wandb_logger = self.tensorboard_logger = None
                self.samples_generator = Samples(strategy, loader, None, None, [])
                self.generate_kwargs: dict[str, Any] = {}

            def init_checkpoint_states(self) -> Any:
                return pickle.loads(run.start) if run.start else super().init_checkpoint_states()

            def restore_best_checkpoint_state(self, states: Any) -> None:
                """There is no evaluation."""

            def broadcast_to_vllm(self) -> None:
                """There is no engine."""

            def train_step(self, samples: Any, global_step: int) -> Any:
                run.seen.append([number_in(prompt) for prompt in samples])
                return {}, global_step + 1

            def save_logs_and_checkpoints(self, global_step: int, status: Any = None, client_states: Any = None) -> None:
                run.saved.append(pickle.dumps(client_states))

        self.trainer = Trainer

    start: bytes | None = None

    def fit(self, start: bytes | None = None) -> list[int]:
        """Rows in the order of training."""
        self.start = start
        self.trainer().fit()
        return [row for batch in self.seen for row in batch]


@pytest.fixture
def page(openrlhf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], Any]:
    recipe = Recipe("openrlhf", tmp_path, monkeypatch)
    recipe.draw(ROWS)
    args = settings(recipe.words("python3 -m openrlhf.cli.train_ppo_ray "), monkeypatch)
    args.rollout.n_samples_per_prompt = 1  # a prompt stands for its group here
    return recipe.order, args


def test_every_draw_is_trained_on_once_and_a_resumed_run_goes_on(
    openrlhf: Any, page: tuple[list[int], Any], evidence: Any
) -> None:
    order, args = page
    run = Run(openrlhf, args)
    whole = run.fit()
    assert sorted(whole) == sorted(order)
    assert len(run.saved) == DRAWS // BATCH
    for stop, saved in enumerate(run.saved, start=1):
        assert whole[: stop * BATCH] + Run(openrlhf, args).fit(saved) == whole, stop
    evidence(
        trainer="openrlhf",
        version="0.11.2",
        kind="run",
        what="its loader, batches and loop of PPO on the file of the page (engines stood in for)",
        stops=len(run.saved),
        exact=len(run.saved),
    )


def test_the_order_of_the_file_is_not_kept(openrlhf: Any, page: tuple[list[int], Any]) -> None:
    order, args = page
    assert Run(openrlhf, args).fit() != order


def test_a_second_episode_has_the_same_draws(openrlhf: Any, page: tuple[list[int], Any]) -> None:
    order, args = page
    args = copy.deepcopy(args)
    args.train.num_episodes = 2
    seen = Run(openrlhf, args).fit()
    assert sorted(seen[:DRAWS]) == sorted(seen[DRAWS:]) == sorted(order)


def test_prompts_that_were_asked_for_ahead_are_lost_at_a_stop(openrlhf: Any, page: tuple[list[int], Any]) -> None:
    _, args = page
    args = copy.deepcopy(args)
    args.rollout.vllm_generate_batch_size = 2 * BATCH
    run = Run(openrlhf, args)
    whole = run.fit()
    rest = Run(openrlhf, args).fit(run.saved[0])
    assert rest == whole[2 * BATCH :]  # what followed the trained batch was asked for with it
