"""All trainer classes of TRL: the order that each gets is that of its own sampler, over draws instead of rows.

A class that TRL adds, or a hook that it changes, fails here.
"""

from __future__ import annotations

import itertools
import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from datasets import Dataset
from trl.trainer.utils import RepeatSampler

from embstore.core.errors import ConfigError, LengthMismatchError
from embstore.integrations.trl import DensitySampling, attach
from embstore.training import DensitySampler, resample_dataset
from tests.support.models import make_tokenizer
from tests.support.trl_classes import CASES, ROWS, WITHOUT_SAMPLER, make, reward, trainer_classes
from tests.support.trl_runs import COMMON, PROMPTS, make_folder
from tests.support.trl_runs import WEIGHTS as RUN_WEIGHTS

WEIGHTS = np.random.default_rng(3).gamma(1.0, size=ROWS)
SETTINGS: list[dict[str, int]] = [
    {},
    {"gradient_accumulation_steps": 2, "num_iterations": 3, "steps_per_generation": 4},
    {"gradient_accumulation_steps": 4, "num_iterations": 2},
]
# experimental classes say so, and SDPO and others warn of settings that they change
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("trl") / "model")


@pytest.fixture
def teacher_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """ServerDistillation speaks to its teacher only in training."""
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", lambda **_: None)


def test_every_trainer_class_is_known() -> None:
    assert set(trainer_classes()) == set(CASES) | WITHOUT_SAMPLER


def test_a_class_repeats_draws_as_its_own_sampler_repeats_rows(
    model: Path, tmp_path: Path, teacher_server: None, evidence: Any
) -> None:
    for name in CASES:
        # once for a class that inherits the sampler of another
        for settings in SETTINGS if "_get_train_sampler" in vars(trainer_classes()[name]) else SETTINGS[:1]:
            trainer = make(name, model, tmp_path, **settings)
            assert len(trainer.train_dataset) == ROWS, name
            own = trainer._get_train_sampler()
            attach(trainer, WEIGHTS, seed=5)
            order = trainer._get_train_sampler(trainer.train_dataset)
            ours = list(order)
            plan = DensitySampler(WEIGHTS, seed=5).plan(0).tolist()
            if isinstance(own, RepeatSampler):
                own.shuffle = False  # row i is then draw i
                assert ours == [plan[row] for row in own], (name, settings)
            else:
                assert ours == plan, name
            order.set_epoch(0)
            read = [row for batch in trainer.get_train_dataloader().batch_sampler for row in batch]
            assert read == ours, (name, settings)
    evidence(trainer="trl", version=trl.__version__, kind="run", what=f"the order of {len(CASES)} trainer classes")


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_distillation_generates_on_exactly_the_plan(model: Path, tmp_path: Path, accumulation: int) -> None:
    trainer = make(
        "trl.trainer.distillation_trainer.DistillationTrainer",
        model,
        tmp_path,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        max_steps=3,
    )
    texts = trainer.train_dataset["prompt"]
    generated: list[str] = []
    generate = trainer._generate_single_turn

    def noting(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        generated.extend(trainer.processing_class.batch_decode(prompt_ids, skip_special_tokens=True))
        return generate(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = noting
    attach(trainer, WEIGHTS, seed=5).train()
    plan = DensitySampler(WEIGHTS, seed=5).plan(0)
    assert generated == [texts[row] for row in plan[: 3 * 2 * accumulation]]


class Worker:
    """A rollout worker that never has anything."""

    def __init__(self) -> None:
        self.rollout_buffer: queue.Queue[object] = queue.Queue()
        self.metrics_queue: queue.Queue[object] = queue.Queue()
        self.stopped = False

    def start(self) -> None: ...

    def stop(self) -> None:
        self.stopped = True

    def check_health(self, *_: Any, **__: Any) -> None: ...

    def update_model_version(self, _: int) -> None: ...


class NoTransfer:
    """Sends weights nowhere."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.mark.parametrize("way", ["mixin", "attach"])
@pytest.mark.parametrize("name", sorted(WITHOUT_SAMPLER))
def test_asynchronous_trainers_stop_before_their_first_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    """Their ``train`` runs as it is, up to the first step; only the name of the GPU is made up."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "none")
    own = trainer_classes()[name]
    package = __import__(name.rpartition(".")[0].rpartition(".")[0], fromlist=["trainer"])
    config = getattr(package, own.__name__.replace("Trainer", "Config"))
    rewards = {"reward_funcs": reward} if "GRPO" in name else {}
    attention = {} if rewards else {"model_init_kwargs": {"attn_implementation": "sdpa"}}
    arguments: dict[str, Any] = {
        "model": str(model),
        "args": config(output_dir=str(tmp_path), max_steps=2, token_budget=64, **COMMON, **attention),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
        "processing_class": make_tokenizer(),
        "rollout_worker": (worker := Worker()),
        "weight_transfer": NoTransfer(),
        **rewards,
    }
    weights = np.ones(len(PROMPTS))
    if way == "mixin":
        trainer = type("Density", (DensitySampling, own), {})(**arguments, density_sampler=DensitySampler(weights))
    else:
        trainer = attach(own(**arguments), weights)
    with pytest.raises(ConfigError, match="did not ask for a sampler: it would train without the weights") as caught:
        trainer.train()
    assert "resample_dataset" in str(caught.value.hint)
    assert trainer.state.global_step == 0
    assert worker.stopped


def test_a2po_keeps_its_prompts_only_without_its_filter(model: Path, tmp_path: Path) -> None:
    name = "trl.experimental.a2po.a2po_trainer.A2POTrainer"
    for keeps in (False, True):
        trainer = make(name, model, tmp_path, filter_all_incorrect=not keeps, num_value_samples=2, max_steps=1)
        trainer.reward_funcs = [lambda completions, **_: [0.0] * len(completions)]
        attach(trainer, WEIGHTS)
        if keeps:
            assert trainer.train().global_step == 1
        else:
            with pytest.raises(LengthMismatchError, match="over 64 weights, the trainer's dataset has 0 rows"):
                trainer.train()


def test_asynchronous_rollouts_of_a_resampled_dataset_are_the_plan(evidence: Any) -> None:
    """The loop of AsyncGRPO that takes prompts, from the beginning and after each number of groups trained on."""
    from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop

    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS], "row": list(range(10))})
    drawn = resample_dataset(rows, RUN_WEIGHTS, 25, seed=5)
    plan = DensitySampler(RUN_WEIGHTS, num_samples=25, seed=5).plan(0).tolist()
    tokenizer = make_tokenizer()
    tokenizer.response_template = ""  # so that none is looked up for this tokenizer

    def prompts(start: int, count: int) -> list[int]:
        channels = ("rollout_buffer", "model_version_value", "heartbeat_value", "failed_event", "exception_info_queue")
        loop = _AsyncRolloutLoop(
            model_name="none",
            dataset=drawn,
            reward_funcs=[reward],
            processing_class=tokenizer,
            eos_token_ids=[tokenizer.eos_token_id],
            metrics_queue=queue.Queue(),
            num_generations=2,
            dataset_start_index=start,
            **dict.fromkeys(channels),
        )
        loop._loop.close()  # as at the end of its run
        groups = list(itertools.islice(loop._repeat_iterator(), 2 * count))
        assert [row["row"] for _, row in groups[::2]] == [row["row"] for _, row in groups[1::2]]
        return [row["row"] for _, row in groups[::2]]

    assert prompts(0, 50) == plan * 2  # a second pass is the same again
    stops = range(1, 25)
    for stop in stops:
        assert prompts(stop, 50 - stop) == (plan * 2)[stop:]
    evidence(
        trainer="trl",
        version=trl.__version__,
        kind="run",
        what="the rollout loop of AsyncGRPO on a resampled dataset",
        stops=len(stops),
        exact=len(stops),
    )
