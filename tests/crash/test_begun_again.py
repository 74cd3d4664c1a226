"""A store without a committed row is begun again by a corrected command; killed at any call, it can be again or be resumed.

What must come out is what the corrected command makes in a new folder. A store that has had a committed row, or a manifest,
is never begun again.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from embstore.core.config import BuildConfig
from embstore.core.errors import BudgetError, EmbstoreError, IdentityMismatchError, StoreExistsError
from embstore.core.events import Event, Notice
from embstore.core.records import OriginRecord
from embstore.storage.journal import read_journal
from embstore.storage.writer import StoreWriter
from embstore.views.info import verify
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource
from tests.support.faults import SYNCS, Call, Killed, SystemCalls
from tests.support.machine import STORE
from tests.support.power import EXTREMES, Disk, Lottery, Survival, Tree, fingerprint, lay
from tests.support.stores import (
    build_part,
    build_small,
    snapshot,
    whole_tree,
    with_embedding,
    write_lines,
)
from tests.support.tally import Counter

MORE_ROWS = 150  # of the mistaken pool: its chunks reach beyond the grid of the right one
WIDER = with_embedding(chunk_rows=32, window_rows=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
    """A command after a mistake: what was begun, and what the corrected command gives."""

    begun_from: str = "mistaken"  # prompts
    begun_with: BuildConfig = CONFIG
    resume: bool
    says: str


CORRECTIONS = {
    "other prompts": Correction(resume=False, says="--resume was not given"),
    "other prompts, resumed": Correction(resume=True, says="the prompts differ"),
    "other settings": Correction(begun_from="right", begun_with=WIDER, resume=False, says="--resume was not given"),
    "other settings, resumed": Correction(begun_from="right", begun_with=WIDER, resume=True, says="window_rows"),
}
# the other two differ in the order in which the same calls come
KILLED = [
    "other prompts, resumed",
    "other settings",
    *[pytest.param(name, marks=pytest.mark.faults) for name in ("other prompts", "other settings, resumed")],
]


@pytest.fixture(scope="module")
def pools(small_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    mistaken = tmp_path_factory.mktemp("mistaken") / "prompts.jsonl"
    lines = [{"prompt": f"A mistake {index}."} for index in range(MORE_ROWS)]
    return {"right": small_prompts, "mistaken": write_lines(mistaken, lines)}


def begin(correction: Correction, pools: dict[str, Path], store: Path) -> Path:
    """A store with prompts, spec and stray chunks of a first window that was never committed."""
    build_part(pools[correction.begun_from], store, rows=0, config=correction.begun_with)
    assert read_journal(store).spec is not None
    assert not read_journal(store).windows
    for index in (0, 1, 9):  # the last one lies beyond the grid of the right pool
        (store / "embeddings.zarr" / f"c.{index}.0").write_bytes(b"a chunk that no line commits")
    return store


def correct(correction: Correction, pools: dict[str, Path], store: Path) -> list[str]:
    """Run the corrected command; the notices it sends."""
    notices: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.message)

    build_small(pools["right"], store, resume=correction.resume, observer=listen)
    return notices


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_corrected_command_begins_again_and_says_so(
    name: str, pools: dict[str, Path], tmp_path: Path, finished_store: Path
) -> None:
    correction = CORRECTIONS[name]
    store = begin(correction, pools, tmp_path / "store")
    notices = correct(correction, pools, store)
    assert snapshot(store) == snapshot(finished_store)
    said = [notice for notice in notices if "is begun again" in notice]
    assert len(said) == 1
    assert correction.says in said[0]
    assert verify(store).findings == verify(store).notes == []


def test_a_resume_with_the_same_prompts_and_settings_goes_on(
    pools: dict[str, Path], tmp_path: Path, finished_store: Path
) -> None:
    store = begin(Correction(begun_from="right", resume=True, says=""), pools, tmp_path / "store")
    (store / "embeddings.zarr" / "c.9.0").unlink()  # a stray, which only a store that is begun again does not keep
    before = (store / "journal.jsonl").read_bytes()
    source = FakeSource()
    notices: list[Event] = []
    build_small(pools["right"], store, source=source, observer=notices.append)
    assert (store / "journal.jsonl").read_bytes().startswith(before)
    assert not source.creations, "nothing was decided again"
    assert not [event for event in notices if isinstance(event, Notice) and "begun" in event.message]
    assert snapshot(store) == snapshot(finished_store)


def test_options_that_are_left_out_are_those_of_the_store_only_on_a_resume(pools: dict[str, Path], tmp_path: Path) -> None:
    """Without --resume an option that is left out has its default, not the value of what was begun."""
    chosen = with_embedding(max_tokens=64)
    for resume, tokens in ((True, 64), (False, 512)):
        store = tmp_path / str(resume)
        begin(Correction(begun_from="right", begun_with=chosen, resume=resume, says=""), pools, store)
        build_small(pools["right"], store, resume=resume)
        with StoreWriter(store, resume=True) as writer:
            assert writer.read_spec().embedding.max_tokens == tokens


def test_damage_to_what_was_begun_begins_it_again(pools: dict[str, Path], tmp_path: Path, finished_store: Path) -> None:
    for name in ("prompts.jsonl", "ids.json", "spec.json", "basis.npy"):
        store = begin(Correction(begun_from="right", resume=True, says=""), pools, tmp_path / name)
        content = bytearray((store / name).read_bytes())
        content[20] ^= 0xFF
        (store / name).write_bytes(content)
        build_small(pools["right"], store, resume=True)
        assert snapshot(store) == snapshot(finished_store)


def test_a_refusal_of_other_settings_keeps_the_prompts(pools: dict[str, Path], tmp_path: Path, finished_store: Path) -> None:
    """They may have come by a pipe, and be nowhere else."""
    store = begin(Correction(begun_from="right", begun_with=WIDER, resume=True, says=""), pools, tmp_path / "store")
    with pytest.raises(BudgetError):
        build_small(None, store, config=dataclasses.replace(CONFIG, memory_budget_bytes=1))
    build_small(None, store)
    assert snapshot(store) == snapshot(finished_store)


def test_a_dataset_that_was_never_read_is_not_where_other_prompts_come_from(small_prompts: Path, tmp_path: Path) -> None:
    """Killed between the two lines of stage 0."""
    store = tmp_path / "store"
    with StoreWriter(store, resume=False) as writer:
        writer.commit(OriginRecord(dataset="org/name", config=None, split="train", revision="a" * 40))
    build_small(small_prompts, store)
    assert read_journal(store).origin is None


# --- what has had a row is never begun again --------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["one window", "demoted", "finished", "without a journal's end"])
def test_a_store_that_has_had_rows_is_never_begun_again(
    kind: str, resume: bool, pools: dict[str, Path], tmp_path: Path, finished_store: Path
) -> None:
    store = tmp_path / "store"
    if kind in ("one window", "demoted"):
        build_part(pools["right"], store, rows=32)
    else:
        shutil.copytree(finished_store, store, symlinks=True)
    if kind == "demoted":  # no window is committed now, but one was
        (store / "embeddings.zarr" / "c.0.0").write_bytes(b"rot")
        verify(store, repair=True)
        assert not read_journal(store).windows
    if kind == "without a journal's end":
        lines = (store / "journal.jsonl").read_bytes().splitlines(keepends=True)
        (store / "journal.jsonl").write_bytes(b"".join(lines[:3]))  # header, prompts, spec
    before = whole_tree(store)
    with pytest.raises(EmbstoreError) as caught:
        build_small(pools["mistaken"], store, resume=resume)
    assert isinstance(caught.value, IdentityMismatchError if resume and kind != "without a journal's end" else EmbstoreError)
    assert resume or isinstance(caught.value, StoreExistsError)
    assert whole_tree(store) == before


# --- killed while it is begun again -----------------------------------------------------------------------------------


def _killed(correction: Correction, pools: dict[str, Path], store: Path, point: int, *, torn: bool = False) -> list[Call]:
    with SystemCalls(root=store, fail_at=point, torn=torn).watching() as calls:
        try:
            correct(correction, pools, store)
        except Killed:
            return calls.calls
    assert not point, f"there is no call {point}"
    return calls.calls


@pytest.mark.parametrize("name", KILLED)
def test_killed_at_any_call_it_can_be_begun_again_or_resumed(
    name: str, pools: dict[str, Path], tmp_path: Path, finished_store: Path, tally: Counter
) -> None:
    correction = CORRECTIONS[name]
    begun = begin(correction, pools, tmp_path / "begun")
    count = Path(shutil.copytree(begun, tmp_path / "count"))
    calls = _killed(correction, pools, count, 0)
    first_window = next(index for index, call in enumerate(calls) if call == Call("pwrite", "coordinates.npy"))
    expected = snapshot(finished_store)
    for point, call in enumerate(calls[:first_window], start=1):
        if call.name in SYNCS:
            continue
        store = Path(shutil.copytree(begun, tmp_path / "store"))
        _killed(correction, pools, store, point, torn=bool(point % 2))
        verify_or_new(store)
        correct(dataclasses.replace(correction, resume=bool(point // 2 % 2)), pools, store)
        is_lost = snapshot(store) != expected
        tally("kill while a store is begun again, in process", losses=int(is_lost))
        assert not is_lost, f"killed at call {point}, {call}"
        shutil.rmtree(store)


def verify_or_new(store: Path) -> None:
    """A reader says nothing is damaged, or that there is no store yet."""
    if (store / "journal.jsonl").stat().st_size:
        assert verify(store).findings == []


def _cuts(begun: Path, correction: Correction, pools: dict[str, Path], folder: Path) -> Iterator[Tree]:
    """What a power cut before each sync of a corrected command may leave, until its first window is committed."""
    survivals: list[Survival] = [*EXTREMES.values(), Lottery(random.Random(7))]
    root = folder / "disk"
    (root / STORE).parent.mkdir(parents=True)
    shutil.copytree(begun, root / STORE)
    disk = Disk(root)
    seen = set()
    found: list[Tree] = []

    def cut() -> None:
        if read_journal(root / STORE).had_windows:
            return  # from here on it is a build as any other
        disk.look()
        for survival in survivals:
            tree = disk.image(survival)
            if (key := fingerprint(tree)) not in seen:
                seen.add(key)
                found.append(tree)

    with SystemCalls(root=root, disk=disk, before_sync=cut).watching():
        correct(correction, pools, root / STORE)
    shutil.rmtree(root)
    yield from found


@pytest.mark.parametrize("name", KILLED)
def test_a_power_cut_while_it_is_begun_again_leaves_what_can_be_begun_again(
    name: str, pools: dict[str, Path], tmp_path: Path, finished_store: Path, tally: Counter
) -> None:
    correction = CORRECTIONS[name]
    begun = begin(correction, pools, tmp_path / "begun")
    expected = snapshot(finished_store)
    num_images = 0
    for tree in _cuts(begun, correction, pools, tmp_path):
        root = tmp_path / "after"
        lay(tree, root)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.fsync", lambda handle: None)
            correct(dataclasses.replace(correction, resume=True), pools, root / STORE)
        is_lost = snapshot(root / STORE) != expected
        tally("power cut while a store is begun again, modelled", losses=int(is_lost))
        assert not is_lost
        num_images += 1
        shutil.rmtree(root)
    assert num_images > 20


def test_a_kill_while_a_refused_store_is_deleted_leaves_one_that_can_be_begun(
    pools: dict[str, Path], tmp_path: Path, finished_store: Path, tally: Counter
) -> None:
    """The budget is refused after stage 0: what was begun is deleted, or can be begun."""
    little = dataclasses.replace(CONFIG, memory_budget_bytes=1)

    def refused(store: Path, point: int) -> list[Call]:
        with SystemCalls(root=store, fail_at=point).watching() as calls, pytest.raises((Killed, EmbstoreError)):
            build_small(pools["right"], store, config=little)
        return calls.calls

    calls = refused(tmp_path / "count", 0)
    assert not (tmp_path / "count").exists()
    deleting = next(index for index, call in enumerate(calls) if call.name == "rename" and call.path == "journal.jsonl")
    for point in range(deleting, len(calls) + 1):
        store = tmp_path / "store"
        refused(store, point)
        build_small(pools["right"], store, resume=False)
        is_lost = snapshot(store) != snapshot(finished_store)
        tally("kill while a refused store is deleted, in process", losses=int(is_lost))
        assert not is_lost, f"killed at call {point}, {calls[point - 1]}"
        shutil.rmtree(store)
