"""A power cut between any two syncs, modelled: what was acknowledged is there, the rest is made again to the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from tests.support.faults import SYNCS, Call
from tests.support.machine import STORE, Lost, Machine
from tests.support.order import below, sync_kind
from tests.support.power import EXTREMES, Survival
from tests.support.scenarios import SCENARIOS, World, extremes_and, images, system_calls
from tests.support.tally import Counter

CUT = "power cut at any sync, modelled"
CUT_LATER = "power cut after a resume, modelled"

Survivals = Callable[[int], Iterable[Survival]]


def _two_extremes(instant: int) -> tuple[Survival, ...]:
    """Nothing that was not synced, and every name without its bytes: these notice every sync that is left out."""
    return EXTREMES["synced"], EXTREMES["names-first"]


def _judge(world: World, tally: Counter, scenario: str, survivals: Survivals) -> list[str]:
    begin, act = SCENARIOS[scenario]
    found = images(begin(world), act, survivals)
    lost = []
    for loss in world.losses(found.values()):
        tally(CUT, losses=loss is not None)
        lost += [loss] if loss is not None else []
    return lost


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_power_cut_at_any_sync_loses_nothing_acknowledged(world: World, tally: Counter, scenario: str) -> None:
    assert _judge(world, tally, scenario, _two_extremes) == []


@pytest.mark.faults
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_power_cut_that_leaves_any_subset_loses_nothing_acknowledged(world: World, tally: Counter, scenario: str) -> None:
    assert _judge(world, tally, scenario, extremes_and(12)) == []


def _unsynced_points(calls: list[Call]) -> list[int]:
    """One point for each kind of sync, at which a kill leaves something that only the page cache holds."""
    relative, seen = below(calls, STORE), dict[str, int]()
    for point, call in enumerate(calls, start=1):
        if call.name in SYNCS:
            seen.setdefault(sync_kind(relative[:point]), point)
    return sorted(seen.values())


def _finish(machine: Machine) -> bool:
    """What a person does after the crash."""
    if machine.promise.rotten:
        machine.repair()
    return machine.build("first" if not machine.current else machine.current[0])


def _kill_resume_and_cut(world: World, tally: Counter, scenario: str, points: list[int] | None) -> list[str]:
    """Kill at each point, let the next writer finish, cut the power: nothing that it relied on may go."""
    begin, act = SCENARIOS[scenario]
    counted = begin(world)
    act(counted)
    calls = system_calls(counted.calls)
    lost = []
    for point in points or range(1, len(calls) + 1):
        machine = begin(world)
        assert not act(machine, fail_at=point), f"there is no call {point}"
        loss = None
        try:
            _finish(machine)
            machine.cut(EXTREMES["synced"])
            machine.check()
            machine.finish()
        except Lost as error:
            call = below(calls, STORE)[point - 1]
            loss = f"killed at {call.name} {call.path}: {error}"
        tally(CUT_LATER, losses=loss is not None)
        lost += [loss] if loss is not None else []
    return lost


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in ("resume", "weights")])
def test_a_resume_makes_durable_what_it_relies_on(world: World, tally: Counter, scenario: str) -> None:
    """A killed writer leaves what only the page cache holds; the next one finds it there and must not trust it."""
    begin, act = SCENARIOS[scenario]
    machine = begin(world)
    act(machine)
    points = _unsynced_points(system_calls(machine.calls))
    assert _kill_resume_and_cut(world, tally, scenario, points) == []


@pytest.mark.faults
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_resume_after_a_kill_at_any_call_makes_durable_what_it_relies_on(
    world: World, tally: Counter, scenario: str
) -> None:
    assert _kill_resume_and_cut(world, tally, scenario, None) == []
