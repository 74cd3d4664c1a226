"""Histories of a modelled machine, and what a power cut may leave at each instant of their last writer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tests.support.faults import SYNCS, Call
from tests.support.machine import FINISHED, STORE, Lost, Machine, Oracle, Promise
from tests.support.order import below, sync_kind
from tests.support.power import EXTREMES, Disk, Survival, Tree, fingerprint

Act = Callable[..., bool]
Images = dict[str, tuple[Tree, Promise]]
# what goes bad, and the window that is lost with it; of the row files it is a byte of the header
DAMAGE = {
    "embeddings.zarr/c.2.0": 1,
    "embeddings.zarr/zarr.json": None,
    **dict.fromkeys(("coordinates.npy", "residuals.npy", "sequences.npy")),
}


class World:
    """Makes machines in ``folder``: from nothing, or with a finished store."""

    def __init__(self, prompts: Path, folder: Path) -> None:
        self.oracle = Oracle(prompts, folder)
        self.folder = folder
        machine = Machine(folder / "disk", self.oracle)
        assert machine.build()
        self.finished = Disk(machine.root).image(EXTREMES["synced"])
        shutil.rmtree(machine.root)

    def empty(self) -> Machine:
        """Nothing is there yet."""
        return self._new(None, Promise())

    def with_store(self) -> Machine:
        """A finished store, all of it durable."""
        return self._new(self.finished, FINISHED)

    def with_damage(self, *names: str) -> Machine:
        """A finished store of which a chunk, the array's metadata and the headers of the row files went bad, or some."""
        machine = self.with_store()
        for name in names or DAMAGE:
            machine.rot(name, 20)
            window = DAMAGE[name]
            if window is not None:
                machine.forget_window(window)
        return machine

    def start(self, tree: Tree, promise: Promise) -> Machine:
        """What is there when the power comes back."""
        return self._new(tree, promise)

    def _new(self, tree: Tree | None, promise: Promise) -> Machine:
        root = self.folder / "disk"
        shutil.rmtree(root, ignore_errors=True)
        return Machine(root, self.oracle, tree=tree, promise=promise)

    def losses(self, images: Iterable[tuple[Tree, Promise]]) -> Iterator[str | None]:
        """Start a machine from each image: what is lost, None if nothing is."""
        for tree, promise in images:
            machine = self.start(tree, promise)
            try:
                machine.check()
                machine.finish()
            except Lost as loss:
                yield str(loss)
            else:
                yield None


def build(machine: Machine, **faults: object) -> bool:
    return machine.build(**faults)  # type: ignore[arg-type]


def other_density(machine: Machine, **faults: object) -> bool:
    return machine.build("second", **faults)  # type: ignore[arg-type]


def new_weights(machine: Machine, **faults: object) -> bool:
    return machine.recompute(**faults)


def repair(machine: Machine, **faults: object) -> bool:
    return machine.repair(**faults)


def build_after_repair(machine: Machine, **faults: object) -> bool:
    leaves_out = faults.get("leaves_out")
    return machine.repair(leaves_out=leaves_out) and machine.build(**faults)  # type: ignore[arg-type]


def resume(machine: Machine, **faults: object) -> bool:
    """A build whose predecessor died in the middle of the journal line of its second window."""
    killed_at(machine, build, lambda calls: [call.path for call in calls].count(f"{STORE}/journal.jsonl") == 9, torn=True)
    return machine.build(**faults)  # type: ignore[arg-type]


SCENARIOS: Mapping[str, tuple[Callable[[World], Machine], Act]] = {
    "build": (World.empty, build),
    "resume": (World.empty, resume),
    "other density": (World.with_store, other_density),
    "weights": (World.with_store, new_weights),
    "repair": (World.with_damage, repair),
    "repair of metadata": (lambda world: world.with_damage("embeddings.zarr/zarr.json"), repair),
    "build after repair": (World.with_damage, build_after_repair),
}


def killed_at(machine: Machine, act: Act, is_point: Callable[[list[Call]], bool], **faults: object) -> None:
    """Run ``act`` to its death before the first call for which ``is_point`` holds, of the calls so far with it."""
    root = machine.root.with_name(f"{machine.root.name}-count")  # one act may count within another
    count = Machine(root, machine.oracle, tree=Disk(machine.root).image(EXTREMES["synced"]), promise=machine.promise)
    act(count)
    shutil.rmtree(root)
    calls = system_calls(count.calls)
    point = next(point for point in range(1, len(calls) + 1) if is_point(calls[:point]))
    assert not act(machine, fail_at=point, **faults)


def system_calls(calls: Iterable[Call]) -> list[Call]:
    """Without what an observer noted between them."""
    return [call for call in calls if call.name != "acknowledged"]


def is_sync_of(kind: str) -> Callable[[list[Call]], bool]:
    """Whether the last call is a sync of this kind."""

    def is_it(calls: list[Call]) -> bool:
        return calls[-1].name in SYNCS and sync_kind(below(system_calls(calls), STORE)) == kind

    return is_it


def images(machine: Machine, act: Act, survivals: Callable[[int], Iterable[Survival]], **faults: object) -> Images:
    """What a power cut before each sync of one writer, and after its end, may leave (equal images once).

    An image seen again is held against what was promised by then. ``survivals`` is given the number of the instant.
    """
    found: Images = {}
    instants = iter(range(1_000_000))

    def cut() -> None:
        instant = next(instants)
        machine.disk.look()
        for survival in survivals(instant):
            tree = machine.disk.image(survival)
            key = fingerprint(tree)
            found.pop(key, None)  # the last come last
            found[key] = (tree, machine.promise)

    act(machine, before_sync=cut, **faults)
    cut()
    return found
