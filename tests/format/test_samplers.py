"""States and pickles of samplers that earlier versions saved: continued in the same order, or refused by name.

Made by 5c26fb9 (December 2026): weights 0.5, 0.3, 0.2, seed 7, one draw into epoch 3. Their order is pinned by the name of
the drawing algorithm, so never make them again.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from embstore.core.errors import WeightsError
from embstore.training import DensitySampler, GroupRepeat
from embstore.training.draws import Method
from embstore.training.resumable import Resumable

pytestmark = pytest.mark.filterwarnings("ignore:without_replacement")

SAVED = Path(__file__).parent / "data" / "samplers"
REMAINING_IID = [0, 0, 0, 1, 1]  # what 5c26fb9 drew in the rest of the epoch


def sampler(method: Method = "systematic") -> DensitySampler:
    return DensitySampler([0.5, 0.3, 0.2], num_samples=2 if method == "without_replacement" else 6, seed=7, method=method)


def replaced() -> dict[str, Resumable]:
    """Samplers of today, by the name of what an earlier version saved of the same sampler."""
    return {
        "systematic-2": sampler(),
        "without-replacement-1": sampler("without_replacement"),
        "groups-of-systematic-2": GroupRepeat(sampler(), 2, 3),
    }


OLD = {
    "systematic-2": "systematic-3",
    "without-replacement-1": "without-replacement-2",
    "groups-of-systematic-2": "systematic-3",
}


@pytest.mark.parametrize("name", OLD)
def test_a_state_of_another_order_is_refused_by_name(name: str) -> None:
    here = replaced()[name]
    before = here.state_dict()
    algorithm = name.removeprefix("groups-of-")
    with pytest.raises(WeightsError, match=f"method: saved '{algorithm}', here '{OLD[name]}'") as caught:
        here.load_state_dict(json.loads((SAVED / f"{name}.json").read_text()))
    assert "finish the run with that version" in str(caught.value.hint)
    assert "set_epoch(3)" in str(caught.value.hint)
    assert here.state_dict() == before
    here.set_epoch(3)  # what the hint says
    assert list(here) == here.plan(3).tolist()


@pytest.mark.parametrize("name", OLD)
def test_a_pickle_of_another_order_is_refused_by_name(name: str) -> None:
    algorithm = name.removeprefix("groups-of-")
    with pytest.raises(WeightsError, match=f"pickled sampler .* saved '{algorithm}', here '{OLD[name]}'") as caught:
        pickle.loads((SAVED / f"{name}.pickle").read_bytes())
    assert "finish the run with that version" in str(caught.value.hint)
    assert "set_epoch(" in str(caught.value.hint)


def test_independent_draws_go_on_in_the_order_they_began() -> None:
    loaded = sampler("iid")
    loaded.load_state_dict(json.loads((SAVED / "iid-1.json").read_text()))
    assert list(loaded) == REMAINING_IID
    unpickled = pickle.loads((SAVED / "iid-1.pickle").read_bytes())
    assert list(unpickled) == REMAINING_IID
    assert unpickled.plan(4).tolist() == sampler("iid").plan(4).tolist()
