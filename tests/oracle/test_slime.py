"""slime's data source with density sampling, on a double of slime: the order of the plan, and every stop resumed."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.errors import ConfigError, WeightsError
from embstore.training import DensitySampler, load_weights
from tests.support.doubles import SLIME, SlimeDataSource, install
from tests.support.stores import small_lines, write_lines

BATCH, GROUP, DRAWS = 6, 2, 31


@pytest.fixture
def source_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    install(monkeypatch, "slime.rollout.data_source", RolloutDataSourceWithBuffer=SlimeDataSource)
    name = "embstore.integrations.slime"
    monkeypatch.delitem(sys.modules, name, raising=False)
    found = importlib.import_module(name).DensityDataSource
    del sys.modules[name]
    return found


def records(store: Path) -> list[dict[str, Any]]:
    """slime's prompts in another order than the store's, each with its id in the store."""
    ids = json.loads((store / "ids.json").read_text(encoding="utf-8"))
    rows = [(line, name) for line, name in zip(small_lines(), ids, strict=True) if "prompt" in line]
    return [
        {"input": line["prompt"], "metadata": {"uid": name, "n": number}} for number, (line, name) in enumerate(rows[::-1])
    ]


@pytest.fixture
def settings(finished_store: Path, tmp_path: Path) -> Callable[..., Namespace]:
    """Arguments of slime."""
    usual = {
        "prompt_data": str(write_lines(tmp_path / "data.jsonl", records(finished_store))),
        "input_key": "input",
        "apply_chat_template": False,
        "rollout_max_prompt_len": 1000,
        "rollout_shuffle": True,
        "rollout_seed": 42,
        "n_samples_per_prompt": GROUP,
        "save": str(tmp_path),
        "load": str(tmp_path),
        "density": {"store": str(finished_store), "num_samples": DRAWS},
    }
    return lambda **changed: Namespace(**{**usual, **changed})


def numbers(batches: list[list[list[Any]]]) -> list[int]:
    """The prompt of each group, which is of one prompt only."""
    groups = [group for batch in batches for group in batch]
    assert all(len({sample.metadata["n"] for sample in group}) == 1 and len(group) == GROUP for group in groups)
    return [group[0].metadata["n"] for group in groups]


@pytest.mark.parametrize("templated", [False, True])
def test_slime_draws_pass_after_pass_and_resumes_at_every_stop(
    templated: bool, source_class: Any, settings: Callable[..., Namespace], finished_store: Path, evidence: Any
) -> None:
    """Templated prompts of more than 23 characters are dropped; the rest are joined by an id in their metadata."""
    args, kept = settings(), records(finished_store)
    if templated:
        args = settings(apply_chat_template=True, rollout_max_prompt_len=23)
        args.density["id_column"] = "uid"
        kept = [record for record in kept if len("<user>" + record["input"]) <= 23]
        assert 0 < len(kept) < len(records(finished_store))
    weights = load_weights(finished_store).align([record["metadata"]["uid"] for record in kept])
    sampler = DensitySampler(weights, num_samples=DRAWS, seed=42)
    plan = np.concatenate([sampler.plan(epoch) for epoch in range(4)])
    whole = source_class(args)
    assert len(whole) == DRAWS
    stops = 4 * DRAWS // BATCH
    batches = []
    for stop in range(stops):
        batches.append(whole.get_samples(BATCH))
        whole.save(stop)
    assert numbers(batches) == [kept[row]["metadata"]["n"] for row in plan[: stops * BATCH]]
    exact = 0
    for stop in range(stops - 1):
        again = source_class(args)
        again.load(stop)
        rest = [again.get_samples(BATCH) for _ in range(min(7, stops - stop - 1))]
        exact += rest == batches[stop + 1 : stop + 1 + len(rest)]
    assert exact == stops - 1
    how = "rendered by a template, joined by an id" if templated else "joined by text"
    evidence(
        trainer="slime",
        version=SLIME,
        kind="double",
        what=f"groups of the data source over four passes, prompts {how}",
        stops=stops - 1,
        exact=exact,
    )


def test_slimes_buffer_comes_first_and_moves_no_draw(source_class: Any, settings: Callable[..., Namespace]) -> None:
    whole = source_class(settings())
    expected = whole.get_samples(BATCH) + whole.get_samples(BATCH)
    source = source_class(settings())
    first = source.get_samples(BATCH)
    source.add_samples(first[2:4])
    assert source.get_samples(BATCH) == first[2:4] + expected[BATCH : 2 * BATCH - 2]


def test_slime_does_not_save_the_groups_in_its_buffer(source_class: Any, settings: Callable[..., Namespace]) -> None:
    source = source_class(settings())
    first = source.get_samples(BATCH)
    source.add_samples(first[4:])
    source.save(0)
    again = source_class(settings())
    again.load(0)
    assert source.get_samples(3)[:2] == first[4:]
    assert again.get_samples(3) == source_class(settings()).get_samples(BATCH + 3)[BATCH:]


def test_slime_does_not_go_on_with_other_weights(source_class: Any, settings: Callable[..., Namespace]) -> None:
    source = source_class(settings())
    source.get_samples(BATCH)
    source.save(0)
    args = settings(rollout_seed=43)
    with pytest.raises(WeightsError, match="differs in seed: saved 42, here 43"):
        source_class(args).load(0)
    source_class(args).load(1)  # there is no such file: slime starts from the beginning


def test_a_slime_run_without_density_sampling_goes_on_with_it(source_class: Any, settings: Callable[..., Namespace]) -> None:
    plain = SlimeDataSource(settings())
    plain.get_samples(BATCH)
    plain.save(0)
    source = source_class(settings())
    source.load(0)
    assert source.get_samples(4) == source_class(settings()).get_samples(BATCH + 4)[BATCH:]
    source.save(1)
    with pytest.raises(WeightsError, match="differs in seed"):
        source_class(settings(rollout_seed=43)).load(1)


def test_what_slime_cannot_order_is_refused(source_class: Any, settings: Callable[..., Namespace]) -> None:
    for changed, complaint in [
        ({"density": None}, "no density part"),
        ({"density": {"store": "s", "seeds": 1}}, "density has no option seeds"),
        ({"rollout_shuffle": False}, "not the data source's"),
        ({"prompt_data": None}, "not the data source's"),
        ({"apply_chat_template": True}, "renders the prompts with a chat template"),
    ]:
        with pytest.raises(ConfigError, match=complaint) as caught:
            source_class(settings(**changed))
        assert caught.value.hint
