"""A NeMo-RL dataset of the drawn prompts, on a double of NeMo-RL: order, every stop resumed, and the group trap."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from embstore.core.errors import ConfigError, KeyMismatchError
from embstore.training import DensitySampler, load_weights
from tests.support.doubles import NEMO_RL, ResponseDataset, baselines, install
from tests.support.stores import small_lines, write_lines

PROMPTS, DRAWS = 8, 8 * 12
# torchdata 0.11 under torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


@pytest.fixture
def dataset_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    install(monkeypatch, "nemo_rl.data.datasets.response_datasets.response_dataset", ResponseDataset=ResponseDataset)
    name = "embstore.integrations.nemo_rl"
    monkeypatch.delitem(sys.modules, name, raising=False)
    found = importlib.import_module(name).DensityDataset
    del sys.modules[name]
    return found


def texts() -> list[str]:
    """Texts of the store, but for the one that it also has as a chat."""
    return [line["prompt"] for line in small_lines()[1:] if "prompt" in line][::-1]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """NeMo-RL's file: an input and an output a line."""
    return str(write_lines(tmp_path / "train.jsonl", [{"input": text, "output": "An answer."} for text in texts()]))


@pytest.fixture
def density(finished_store: Path) -> dict[str, Any]:
    return {"store": str(finished_store), "num_samples": DRAWS, "no_repeat_within": PROMPTS, "seed": 3}


def plan(store: Path, **options: Any) -> list[str]:
    """The texts in the order of the plan."""
    sampler = DensitySampler(load_weights(store).for_dataset(texts()), **options)
    return [texts()[row] for row in sampler.plan(0)]


def first_turns(rows: Any) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


def loader(dataset: Any, workers: int, *, shuffle: bool = False) -> StatefulDataLoader[Any]:
    """As NeMo-RL's setup makes it (algorithms/grpo.py, line 593)."""
    return StatefulDataLoader(
        dataset, batch_size=PROMPTS, shuffle=shuffle, collate_fn=first_turns, drop_last=True, num_workers=workers
    )


@pytest.mark.filterwarnings("ignore:.*contains plain texts:UserWarning")
def test_nemo_rl_reads_the_plan_and_resumes_at_every_stop(
    dataset_class: Any, data: str, density: dict[str, Any], finished_store: Path, tmp_path: Path, evidence: Any
) -> None:
    dataset = dataset_class(data_path=data, density=density)
    expected = plan(finished_store, num_samples=DRAWS, no_repeat_within=PROMPTS, seed=3)
    assert first_turns(dataset.dataset) == expected
    assert set(dataset.dataset.column_names) == {"messages", "task_name"}
    file, exact = tmp_path / "train_dataloader.pt", 0
    stops = [(0, stop) for stop in range(1, DRAWS // PROMPTS)] + [(2, 5)]
    for workers, stop in stops:
        first = loader(dataset.dataset, workers)
        seen = list(itertools.islice(first, stop))
        torch.save(first.state_dict(), file)
        del first
        again = loader(dataset_class(data_path=data, density=density).dataset, workers)
        again.load_state_dict(torch.load(file))
        exact += list(itertools.chain(*seen, *again)) == expected
    assert exact == len(stops)
    evidence(
        trainer="nemo-rl",
        version=NEMO_RL,
        kind="double",
        what="prompts of its stateful loader, state through torch.load with weights_only, 0 and 2 workers",
        stops=len(stops),
        exact=exact,
    )


@pytest.mark.filterwarnings("ignore:.*contains plain texts:UserWarning")
def test_nemo_rl_merges_the_groups_of_a_prompt_that_is_drawn_twice_in_a_step(
    dataset_class: Any, data: str, density: dict[str, Any]
) -> None:
    """Two rollouts a draw: the baseline of a draw is the other rollout's reward, unless its prompt comes again."""
    generator = torch.Generator().manual_seed(0)
    for apart in (0, PROMPTS):
        dataset = dataset_class(data_path=data, density=density | {"no_repeat_within": apart})
        row_of = {text: number for number, text in enumerate(texts())}
        merged = 0
        for step in loader(dataset.dataset, 0):
            prompts = torch.tensor([row_of[text] for text in step]).repeat_interleave(2)[:, None]
            rewards = torch.rand(2 * PROMPTS, generator=generator)
            own = rewards.reshape(-1, 2).flip(1).reshape(-1)
            is_own = torch.isclose(baselines(prompts, rewards), own)
            merged += int(not is_own.all())
            assert is_own.all() == (len(set(step)) == PROMPTS)
        assert (merged > 0) == (apart == 0)


@pytest.mark.filterwarnings("ignore:.*contains plain texts:UserWarning")
def test_nemo_rl_must_not_shuffle_the_draws(dataset_class: Any, data: str, density: dict[str, Any]) -> None:
    """Proportions stay, but the order is not the plan, and repeats meet in one step again."""
    dataset = dataset_class(data_path=data, density=density)
    torch.manual_seed(0)
    steps = list(loader(dataset.dataset, 0, shuffle=True))
    shuffled = list(itertools.chain(*steps))
    assert sorted(shuffled) == sorted(first_turns(dataset.dataset))
    assert shuffled != first_turns(dataset.dataset)
    assert any(len(set(step)) < PROMPTS for step in steps)


@pytest.mark.filterwarnings("ignore:.*contains plain texts:UserWarning")
def test_every_pass_of_nemo_rl_is_the_same_plan(dataset_class: Any, data: str, density: dict[str, Any]) -> None:
    batches = loader(dataset_class(data_path=data, density=density).dataset, 0)
    assert list(batches) == list(batches)


def test_rows_of_nemo_rl_are_joined_in_every_form(
    dataset_class: Any, density: dict[str, Any], finished_store: Path, tmp_path: Path
) -> None:
    """Chats are joined without their answer, whole if their column is named, or by an id; a validation part stays apart."""
    chats = [
        {"uid": f"row {number}", "messages": line.get("messages") or [{"role": "user", "content": line["prompt"]}]}
        for number, line in enumerate(small_lines())
    ]
    alone = [row for row in chats if row["messages"][0]["content"].startswith("Explain chat")]
    answered = [row | {"messages": [*row["messages"], {"role": "assistant", "content": "Yes."}]} for row in alone]
    options = density | {"num_samples": 24, "no_repeat_within": 0}
    expected = DensitySampler(load_weights(finished_store).for_dataset(alone), num_samples=24, seed=3).plan(0).tolist()
    for name, rows in (("alone", alone), ("answered", answered)):
        path = str(write_lines(tmp_path / f"{name}.jsonl", rows))
        found = dataset_class(data_path=path, density=options).dataset
        assert found["uid"][:] == [alone[row]["uid"] for row in expected]
        if name == "answered":
            with pytest.raises(KeyMismatchError, match="4 of 4 items"):
                dataset_class(data_path=path, density=options | {"key_column": "messages"})
    split = dataset_class(data_path=path, density=options, split_validation_size=0.5)
    assert len(split.dataset) == 24
    assert len(split.val_dataset) == 2
    assert set(split.dataset["uid"]).isdisjoint(split.val_dataset["uid"])
    with pytest.raises(KeyMismatchError, match="4 of 4 items"):
        dataset_class(data_path=path, density=options | {"id_column": "uid"})


@pytest.mark.filterwarnings("ignore:.*contains plain texts:UserWarning")
def test_nemo_rl_is_told_what_is_missing(dataset_class: Any, data: str, density: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no density part"):
        dataset_class(data_path=data)
    del density["no_repeat_within"]
    with pytest.warns(UserWarning, match=r"one group of equal prompts .* grpo.num_prompts_per_step"):
        dataset_class(data_path=data, density=density)
