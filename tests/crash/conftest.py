"""Writers on a modelled disk, recorded once for every test of their order and of what they sync."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.faults import Call
from tests.support.machine import STORE
from tests.support.order import below
from tests.support.scenarios import SCENARIOS, World


@pytest.fixture(scope="session")
def world(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The stores that modelled machines start from."""
    return World(small_prompts, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def recorded(world: World) -> dict[str, list[Call]]:
    """The calls of the last writer of every scenario; read them, never change them."""
    calls = {}
    for name, (begin, act) in SCENARIOS.items():
        machine = begin(world)
        assert act(machine)
        calls[name] = below(machine.calls, STORE)
    return calls
