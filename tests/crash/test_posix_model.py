"""Any history of builds, kills, repairs, new weights and power cuts, on a modelled disk: the promise holds at every step.

Hypothesis draws the history, a lottery draws what a power cut leaves: any subset of name changes and sectors that were not
synced (tests.support.power). What is promised, and held against the disk after each step, is tests.support.machine's.
"""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.support.machine import CONFIGS, Lost, Machine, Oracle
from tests.support.power import EXTREMES, Lottery
from tests.support.tally import Counter

# a build makes about 180 calls, a resume of a finished store about 30: early calls are drawn as often as late ones
POINTS = st.one_of(st.integers(1, 12), st.integers(1, 60), st.integers(1, 180))
ROTTEN = {
    "embeddings.zarr/c.0.0": 0,
    "embeddings.zarr/c.3.0": 1,
    "embeddings.zarr/zarr.json": None,
    "residuals.npy": None,  # a byte of its header: no window is lost
    "sequences.npy": None,
}


CUT = "power cut, any subset survives, modelled"


class History(RuleBasedStateMachine):
    """One disk, one writer at a time."""

    oracle: Oracle
    tally: Counter

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="embstore-model-")
        self.machine = Machine(Path(self._folder.name) / "disk", self.oracle)

    def teardown(self) -> None:
        self._judge("resume at the end of a history, modelled", self.machine.finish)
        self._folder.cleanup()

    @precondition(lambda self: not self.machine.promise.rotten)
    @rule(density=st.sampled_from(sorted(CONFIGS)), point=POINTS, torn=st.booleans())
    def build_until_killed(self, density: str, point: int, torn: bool) -> None:
        self._judge("kill at a drawn call, modelled", lambda: self.machine.build(density, fail_at=point, torn=torn))

    @precondition(lambda self: not self.machine.promise.rotten)
    @rule(density=st.sampled_from(sorted(CONFIGS)), point=POINTS)
    def build_until_the_disk_fails(self, density: str, point: int) -> None:
        """A sync that fails loses what it should have written; the page cache goes on to show it."""
        self._judge("EIO at a drawn call, modelled", lambda: self.machine.build(density, fail_at=point, error=errno.EIO))

    @precondition(lambda self: not self.machine.promise.rotten)
    @rule(density=st.sampled_from(sorted(CONFIGS)))
    def build_to_the_end_alone(self, density: str) -> None:
        self._judge("second writer beside a build, modelled", lambda: self.machine.build(density, second_writer=True))

    @precondition(lambda self: self.machine.current is not None and not self.machine.promise.rotten)
    @rule(point=st.one_of(st.just(0), st.integers(1, 31)), torn=st.booleans())
    def recompute_weights(self, point: int, torn: bool) -> None:
        self._judge("kill while weights are replaced, modelled", lambda: self.machine.recompute(fail_at=point, torn=torn))

    @precondition(lambda self: self.machine.is_begun)
    @rule(point=st.one_of(st.just(0), st.integers(1, 24)), torn=st.booleans(), error=st.sampled_from([None, errno.EIO]))
    def repair(self, point: int, torn: bool, error: int | None) -> None:
        fault = "kill" if error is None else "EIO"
        self._judge(
            f"{fault} during verify --repair, modelled",
            lambda: self.machine.repair(fail_at=point, torn=torn, error=error),
        )

    @precondition(lambda self: self.machine.promise.rotten)
    @rule(point=POINTS)
    def repair_and_build(self, point: int) -> None:
        self._judge(
            "kill after verify --repair, modelled", lambda: self.machine.repair() and self.machine.build(fail_at=point)
        )

    @precondition(lambda self: self.machine.current is not None and len(self.machine.promise.allowed) == 1)
    @rule(name=st.sampled_from(sorted(ROTTEN)))
    def bit_rot(self, name: str) -> None:
        if name in self.machine.promise.rotten:
            return
        self.machine.rot(name, 20)
        if (window := ROTTEN[name]) is not None:
            self.machine.forget_window(window)

    @rule(kind=st.sampled_from([*EXTREMES, *["any subset"] * 8]), seed=st.integers(0, 2**32))
    def power_cut(self, kind: str, seed: int) -> None:
        """Three other subsets that might have survived are looked at, then one of them is what goes on."""
        draws = [Lottery(random.Random(f"{seed} {draw}")) for draw in range(4)]
        self.machine.disk.look()
        for tree in [self.machine.disk.image(survival) for survival in draws[1:]]:
            other = Machine(self.machine.root.with_name("other"), self.oracle, tree=tree, promise=self.machine.promise)
            self._judge(CUT, other.check)
            shutil.rmtree(other.root)
        self._judge(CUT, lambda: self.machine.cut(EXTREMES.get(kind) or draws[0]))

    @rule(density=st.sampled_from(sorted(CONFIGS)), point=POINTS, torn=st.booleans(), seed=st.integers(0, 2**32))
    def power_cut_during_a_build(self, density: str, point: int, torn: bool, seed: int) -> None:
        if self.machine.promise.rotten:
            self.machine.repair(fail_at=point)
        else:
            self.machine.build(density, fail_at=point, torn=torn)
        self.power_cut("any subset", seed)

    @invariant()
    def promise_is_kept(self) -> None:
        self.machine.check()

    def _judge(self, fault: str, happens: Callable[[], object]) -> None:
        try:
            happens()
            self.machine.check()
        except Lost:
            self.tally(fault, losses=1)
            raise
        self.tally(fault)


def _run(oracle: Oracle, tally: Counter, **options: object) -> None:
    profile = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck), **options)  # type: ignore[arg-type]
    run_state_machine_as_test(type("History", (History,), {"oracle": oracle, "tally": tally}), settings=profile)


@pytest.fixture(scope="module")
def oracle(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(small_prompts, tmp_path_factory.mktemp("oracle"))


def test_no_history_of_kills_and_power_cuts_breaks_a_promise(oracle: Oracle, tally: Counter) -> None:
    _run(oracle, tally, max_examples=12, stateful_step_count=12, derandomize=True)


@pytest.mark.faults
def test_no_long_history_of_kills_and_power_cuts_breaks_a_promise(oracle: Oracle, tally: Counter) -> None:
    _run(oracle, tally, max_examples=150, stateful_step_count=25)
