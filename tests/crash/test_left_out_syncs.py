"""Every sync that the package makes, left out: the order of calls, a power cut on the modelled disk, or both notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.faults import SYNCS, Call
from tests.support.machine import Machine
from tests.support.order import problems, sync_kind
from tests.support.power import EXTREMES, Survival
from tests.support.scenarios import (
    SCENARIOS,
    Act,
    World,
    build,
    build_after_repair,
    images,
    is_sync_of,
    killed_at,
    new_weights,
    repair,
)
from tests.support.tally import Counter

BOTH, ORDER, CUT = {"order", "cut"}, {"order"}, {"cut"}
KINDS: dict[str, set[str]] = {
    "parents of the store, after mkdir": BOTH,
    "parents of the store, on opening": CUT,
    "journal, on opening": BOTH,
    "journal, a line": BOTH,
    "store, on opening": BOTH,
    "prompts_list.json (temp), bytes": BOTH,
    "prompts.jsonl (temp), bytes": BOTH,
    "ids.json (temp), bytes": BOTH,
    "aliases.json (temp), bytes": BOTH,
    "quarantine.jsonl (temp), bytes": BOTH,
    "line_rows.npy (temp), bytes": BOTH,
    "multiplicity.npy (temp), bytes": BOTH,
    "keys.npy (temp), bytes": BOTH,
    "store, after rename keys.npy": BOTH,
    "store, after mkdir embeddings.zarr": ORDER,
    "basis.npy (temp), bytes": BOTH,
    "embeddings.zarr/zarr.json (temp), bytes": BOTH,
    "embeddings.zarr, after rename embeddings.zarr/zarr.json": BOTH,
    "embeddings.zarr, on opening": CUT,
    "coordinates.npy (temp), bytes": BOTH,
    "residuals.npy (temp), bytes": BOTH,
    "spec.json (temp), bytes": BOTH,
    "store, after rename spec.json": BOTH,
    "embeddings.zarr/c.N.0 (temp), bytes": BOTH,
    "embeddings.zarr, after rename embeddings.zarr/c.N.0": BOTH,
    "coordinates.npy, bytes": BOTH,
    "coordinates.npy, on opening": CUT,
    "residuals.npy, bytes": BOTH,
    "residuals.npy, on opening": CUT,
    "store, after mkdir neighbors": ORDER,
    "neighbors, after mkdir neighbors/DIGEST": BOTH,
    "neighbors, on opening": CUT,
    "neighbors/DIGEST/ids.npy (temp), bytes": BOTH,
    "neighbors/DIGEST/distances.npy (temp), bytes": BOTH,
    "neighbors/DIGEST/groups.npy (temp), bytes": BOTH,
    "neighbors/DIGEST/spec.json (temp), bytes": BOTH,
    "neighbors/DIGEST, after rename neighbors/DIGEST/spec.json": BOTH,
    "store, after mkdir weights": ORDER,
    "weights/DIGEST.npy (temp), bytes": BOTH,
    "weights/DIGEST.json (temp), bytes": BOTH,
    "weights, after rename weights/DIGEST.json": BOTH,
    "chunks.json (temp), bytes": BOTH,
    "store, after rename chunks.json": ORDER,
    "manifest.json (temp), bytes": BOTH,
    "store, after rename manifest.json": ORDER,  # the links are synced next, and only then is a build done
    "store, after rename embeddings_metadata.json": BOTH,
    "store, after rename manifest.withdrawn.json": BOTH,
}


def _killed(act: Act, kind: str, begin: Callable[[World], Machine]) -> Callable[[World], Machine]:
    """A machine whose last writer died before its first sync of this kind."""

    def made(world: World) -> Machine:
        machine = begin(world)
        killed_at(machine, act, is_sync_of(kind))
        return machine

    return made


def _damaged(name: str) -> Callable[[World], Machine]:
    return lambda world: world.with_damage(name)


def _repaired(name: str) -> Callable[[World], Machine]:
    def made(world: World) -> Machine:
        machine = world.with_damage(name)
        assert machine.repair()
        return machine

    return made


# what a writer syncs before it trusts it is missed only where its predecessor died at the right moment
AFTER_A_KILL: dict[str, tuple[Callable[[World], Machine], Act]] = {
    "parents of the store, on opening": (_killed(build, "parents of the store, after mkdir", World.empty), build),
    "journal, on opening": (_killed(build, "journal, a line", _killed(build, "coordinates.npy, bytes", World.empty)), build),
    "store, on opening": (_killed(new_weights, "store, after rename embeddings_metadata.json", World.with_store), repair),
    "neighbors, on opening": (_killed(build, "neighbors, after mkdir neighbors/DIGEST", World.empty), build),
    "embeddings.zarr, on opening": (
        _killed(repair, "embeddings.zarr, after rename embeddings.zarr/zarr.json", _damaged("embeddings.zarr/zarr.json")),
        build_after_repair,
    ),
    "coordinates.npy, on opening": (
        _killed(build, "coordinates.npy, bytes", _repaired("coordinates.npy")),
        build,
    ),
    "residuals.npy, on opening": (_killed(build, "residuals.npy, bytes", _repaired("residuals.npy")), build),
}


def _kinds(calls: list[Call]) -> list[str | None]:
    """The kind of each call, None where it is no sync."""
    return [sync_kind(calls[: index + 1]) if call.name in SYNCS else None for index, call in enumerate(calls)]


def test_every_kind_of_sync_is_in_the_table(recorded: dict[str, list[Call]]) -> None:
    found = {kind for calls in recorded.values() for kind in _kinds(calls)} - {None}
    assert found == set(KINDS), "a new sync needs a line in KINDS, and something that notices when it is left out"


def _family(kind: str) -> str:
    """What a reader of the report calls it."""
    if kind.startswith("journal"):
        return "journal"
    if "c.N.0 (temp)" in kind:
        return "chunk"
    if kind.startswith(("coordinates.npy, ", "residuals.npy, ")):
        return "coordinates and residuals"
    return "other file" if "(temp)" in kind else "folder"


def _noticed_by_order(recorded: dict[str, list[Call]], kind: str) -> bool:
    for calls in recorded.values():
        kinds = _kinds(calls)
        if kind in kinds and problems([call for call, its in zip(calls, kinds, strict=True) if its != kind]):
            return True
    return False


def _noticed_by_cut(world: World, recorded: dict[str, list[Call]], kind: str) -> bool:
    begin, act = AFTER_A_KILL.get(kind) or next(SCENARIOS[name] for name, calls in recorded.items() if kind in _kinds(calls))
    is_it, left_out = is_sync_of(kind), []

    def leaves_out(calls: list[Call]) -> bool:
        left_out.append(is_it(calls))
        return left_out[-1]

    def survivals(instant: int) -> Iterator[Survival]:
        if any(left_out):
            yield from (EXTREMES["synced"], EXTREMES["names-first"])

    found = list(images(begin(world), act, survivals, leaves_out=leaves_out).values())
    assert any(left_out), f"no sync is of the kind {kind}"
    return any(loss is not None for loss in world.losses([found[-2], found[-1], *found[:-2]]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_calls_notices_a_sync_that_is_left_out(
    recorded: dict[str, list[Call]], tally: Counter, kind: str
) -> None:
    is_noticed = _noticed_by_order(recorded, kind)
    if "order" in KINDS[kind]:
        tally(f"left-out sync noticed: {_family(kind)}, order of calls", losses=not is_noticed)
    assert is_noticed == ("order" in KINDS[kind])


@pytest.mark.parametrize("kind", [kind for kind, by in KINDS.items() if "cut" in by])
def test_a_power_cut_notices_a_sync_that_is_left_out(
    world: World, recorded: dict[str, list[Call]], tally: Counter, kind: str
) -> None:
    is_noticed = _noticed_by_cut(world, recorded, kind)
    tally(f"left-out sync noticed: {_family(kind)}, modelled", losses=not is_noticed)
    assert is_noticed


@pytest.mark.faults
@pytest.mark.parametrize("kind", [kind for kind, by in KINDS.items() if "cut" not in by])
def test_a_power_cut_does_not_miss_a_sync_that_another_makes_good(
    world: World, recorded: dict[str, list[Call]], kind: str
) -> None:
    """So that the table says what is so."""
    assert not _noticed_by_cut(world, recorded, kind)
