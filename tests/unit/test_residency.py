"""Units of weights are open when a batch computes with them, together they fit the capacity, and every batch ends."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from embstore.core.interfaces import Check
from embstore.model.laps import Job, Lap, add_gates
from embstore.model.residency import Residency
from embstore.model.units import Parts, Place, Unit
from tests.support.limits import TimeLimit


class Layer(nn.Module):
    """Passes on what it is given, while its weights are there."""

    def __init__(self, weights: FakeWeights, number: int) -> None:
        super().__init__()
        self.number, self.calls, self._weights = number, 0, weights

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert self.number in self._weights.held, f"unit {self.number} was dropped before a batch had passed it"
        return given


class FakeWeights:
    """Counts bytes; implements what ``Residency`` asks of ``Weights``."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.held, self.most_bytes = sizes, set[int](), 0
        self.device = torch.device("cpu")
        self.made: list[int] = []
        self.fails = -1
        self.layers = [Layer(self, number) for number in range(len(sizes))]
        self.parts = Parts(units=tuple(self._unit(layer) for layer in self.layers), tables=(), base=())

    def _unit(self, layer: Layer) -> Unit:
        place = Place(module=layer, name="weight", full_name=f"{layer.number}.weight", stored=torch.zeros(1))
        return Unit(number=layer.number, name=str(layer.number), gates=(layer,), places=(place,))

    def bytes_of(self, unit: Unit) -> int:
        return self.sizes[unit.number]

    def make(self, unit: Unit) -> Callable[[], None]:
        assert unit.number not in self.held
        self.held.add(unit.number)
        self.most_bytes = max(self.most_bytes, sum(self.sizes[number] for number in self.held))
        if unit.number == self.fails:
            raise OSError(5, "Input/output error")
        self.made.append(unit.number)
        return lambda: None

    def drop(self, unit: Unit) -> None:
        self.held.remove(unit.number)


class Backbone:
    """Fake weights behind gates, and their residency."""

    def __init__(self, sizes: Sequence[int], capacity: int) -> None:
        self.weights = FakeWeights(sizes)
        self.residency = Residency(self.weights, capacity)  # type: ignore[arg-type]
        assert len(list(add_gates(self.weights.parts.units))) == len(sizes)
        self.ended: list[list[int]] = []

    def job(self, visits: Sequence[int]) -> tuple[Job, int]:
        """A batch that calls these layers one after the other, and its cost."""

        def run() -> None:
            seen: list[int] = []
            for number in visits:
                self.weights.layers[number](torch.zeros(1))
                seen.append(number)
            self.ended.append(seen)

        return run, len(visits)

    def lap(self, batches: Sequence[Sequence[int]], num_threads: int, check: Check) -> list[BaseException]:
        """Run them, in as many threads; errors of the threads."""
        lap = Lap(self.residency, check)
        errors: list[BaseException] = []

        def run(share: Job) -> None:
            try:
                share()
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                errors.append(error)

        shares = lap.share([self.job(visits) for visits in batches], num_threads)
        threads = [threading.Thread(target=run, args=(share,), daemon=True) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return errors


UNITS = 5
VISITS = st.lists(st.integers(0, UNITS - 1), max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    laps=st.lists(st.lists(VISITS, max_size=8), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=UNITS, max_size=UNITS),
    spare=st.integers(0, 4),
    alone=st.booleans(),
    num_threads=st.integers(1, 3),
)
def test_every_batch_ends_whatever_the_order_of_its_visits(
    laps: list[list[list[int]]], sizes: list[int], spare: int, alone: bool, num_threads: int
) -> None:
    """Layers are skipped and repeated, each batch in an order of its own; room for the two largest, or for one."""
    largest = sorted(sizes)[-1:] if alone else sorted(sizes)[-2:]
    backbone = Backbone(sizes, sum(largest) + spare)
    for batches in laps:
        backbone.ended.clear()
        assert backbone.lap(batches, num_threads, TimeLimit(30).check) == []
        assert sorted(backbone.ended) == sorted(batches)
    assert backbone.weights.most_bytes <= sum(largest) + spare
    backbone.residency.close()
    assert backbone.weights.held == set()


def test_a_capacity_below_a_unit_opens_it_alone() -> None:
    backbone = Backbone([3, 3, 3], 1)
    assert backbone.lap([[0, 1, 2]] * 4, 2, TimeLimit(30).check) == []
    assert backbone.weights.most_bytes == 3
    backbone.residency.close()


@pytest.mark.parametrize("num_batches", [1, 7])
@pytest.mark.parametrize("capacity", [2, 3])
def test_weights_are_made_once_a_lap_in_the_order_of_the_layers(num_batches: int, capacity: int) -> None:
    backbone = Backbone([1] * UNITS, capacity)
    for _ in range(3):
        backbone.weights.made.clear()
        assert backbone.lap([list(range(UNITS))] * num_batches, 1, TimeLimit(30).check) == []
        made = backbone.weights.made
        kept = [unit for unit in range(UNITS) if unit not in made]  # still open since the lap before
        assert Counter(made) == Counter(set(range(UNITS)) - set(kept))
        assert made == sorted(made)
    backbone.residency.close()


def test_the_next_unit_is_read_while_batches_compute() -> None:
    """Once the order was seen: all batches stop in layer 1 until layer 2 is there, which none of them has asked for."""
    backbone = Backbone([1] * 4, 2)
    limit = TimeLimit(30)
    assert backbone.lap([[0, 1, 2, 3]] * 3, 1, limit.check) == []

    def until_read_ahead(module: nn.Module, arguments: object) -> None:
        while 2 not in backbone.weights.held:
            limit.check()

    backbone.weights.layers[1].register_forward_pre_hook(until_read_ahead)
    assert backbone.lap([[0, 1, 2, 3]] * 3, 1, limit.check) == []
    backbone.residency.close()


def test_a_wrong_guess_costs_a_read_and_no_more() -> None:
    backbone = Backbone([1] * UNITS, 2)
    limit = TimeLimit(30)
    orders = list(itertools.permutations(range(UNITS)))[::7]
    for order in orders:
        assert backbone.lap([order] * 3, 2, limit.check) == []
    assert backbone.weights.most_bytes <= 2
    assert len(backbone.weights.made) <= 3 * UNITS * len(orders)
    backbone.residency.close()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("fails", range(4))
def test_weights_that_cannot_be_made_end_the_lap_and_leave_nothing(num_threads: int, fails: int) -> None:
    backbone = Backbone([1] * 4, 2)
    for is_known in (False, True):  # asked for by a batch, and read ahead
        backbone.weights.fails = fails
        errors = backbone.lap([[0, 1, 2, 3]] * 6, num_threads, TimeLimit(30).check)
        assert errors, is_known
        assert all(isinstance(error, OSError) and error.errno == 5 for error in errors)
        assert fails not in backbone.weights.held
        backbone.weights.fails = -1
        backbone.ended.clear()
        assert backbone.lap([[0, 1, 2, 3]] * 6, num_threads, TimeLimit(30).check) == []
        assert len(backbone.ended) == 6
    assert backbone.weights.most_bytes <= 2
    backbone.residency.close()
    assert backbone.weights.held == set()


class Stubborn(Exception):
    """Raised by a batch while it is thrown out."""


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_batch_that_minds_being_thrown_out_keeps_no_unit(num_threads: int) -> None:
    backbone = Backbone([1] * 4, 2)

    def fail(module: nn.Module, arguments: object) -> None:
        raise ValueError("the first error")

    def job(visits: Sequence[int]) -> tuple[Job, int]:
        def run() -> None:
            try:
                for number in visits:
                    backbone.weights.layers[number](torch.zeros(1))
            except BaseException as error:
                if isinstance(error, ValueError):
                    raise
                raise Stubborn from error

        return run, 1

    genuine, backbone.job = backbone.job, job  # type: ignore[method-assign]
    hook = backbone.weights.layers[1].register_forward_pre_hook(fail)
    errors = backbone.lap([[0, 1, 2, 3]] * 6, num_threads, TimeLimit(30).check)
    assert {str(error) for error in errors} == {"the first error"}
    hook.remove()
    backbone.job = genuine  # type: ignore[method-assign]
    assert backbone.lap([[3, 2, 1, 0]] * 6, num_threads, TimeLimit(30).check) == []
    assert len(backbone.ended) == 6
    backbone.residency.close()


def test_a_gate_outside_a_lap_is_an_error() -> None:
    backbone = Backbone([1], 1)
    with pytest.raises(AssertionError, match="outside a lap"):
        backbone.weights.layers[0](torch.zeros(1))
    assert backbone.weights.layers[0].calls == 0
    backbone.residency.close()
