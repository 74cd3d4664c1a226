"""Bit rot in any file of a store: verify finds and names it, no reader serves it, repair and a resume mend only that."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from embstore.core.config import WeightingConfig
from embstore.core.errors import CorruptStoreError, EmbstoreError, StorageError
from embstore.core.format import STAGE0_FILES, chunk_name
from embstore.flow.artifact import recompute_weights
from embstore.flow.build import BuildReport
from embstore.storage.reader import open_store
from embstore.storage.verify import VerifyReport
from embstore.training import load_weights
from embstore.views.info import verify
from tests.support.fake import FakeSource
from tests.support.rot import (
    CHECKED,
    MAPPED,
    NAME,
    Damage,
    damages,
    every_byte_flipped,
    flipped_bits,
    outcome,
    readings,
    remove,
    served_wrongly,
    tree_state,
)
from tests.support.stores import NUM_CHUNKS, NUM_ROWS, WINDOWS, build_small, snapshot
from tests.support.tally import Counter

pytestmark = pytest.mark.usefixtures("without_syncs")

CHUNKS = [chunk_name(index) for index in range(NUM_CHUNKS)]
WINDOW_OF_CHUNK = [0, 0, 1, 1, 2]
ROW_FILES = ("coordinates.npy", "residuals.npy", "sequences.npy")
ONLY_A_NEW_BUILD = {*STAGE0_FILES, "spec.json", "basis.npy"}
LINKS = ("density_weights.npy", "embeddings_metadata.json")
# what every writer touches, and what a repair or a resume is allowed to
ALWAYS_WRITTEN = (".lock", "runs.jsonl", ".", "work")
REPAIRED = ("journal.jsonl", "manifest.json", "manifest.withdrawn.json")


@pytest.fixture(scope="module")
def named_store(finished_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store with weights of another name; leave it as it was."""
    store = Path(shutil.copytree(finished_store, tmp_path_factory.mktemp("named") / "store", symlinks=True))
    recompute_weights(store, WeightingConfig(gamma=2), name=NAME)
    return store


@pytest.fixture(scope="module")
def other_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file outside any store, which nobody may write to."""
    path = tmp_path_factory.mktemp("other") / "other.npy"
    path.write_bytes(b"somebody else's bytes" * 40)
    return path


def files_of(store: Path) -> list[str]:
    """Every file that the store's commits cover, its manifest included, without journal and links."""
    manifest = store / "manifest.json"
    if manifest.exists():
        return ["manifest.json", *json.loads(manifest.read_bytes())["files"], *CHUNKS]
    return [*STAGE0_FILES, "spec.json", "basis.npy", "embeddings.zarr/zarr.json", *ROW_FILES, *CHUNKS[:2]]


def damaged(store: Path, other: Path, *, seed: int, count: int) -> Iterator[tuple[str, Damage]]:
    """The store with one damage at a time; each is undone before the next."""
    for name in files_of(store):
        content = (store / name).read_bytes()
        for damage in damages(content, random.Random(f"{seed} {name}"), count=count, other=other):
            damage.apply(store / name)
            yield name, damage
            remove(store / name)
            (store / name).write_bytes(content)


def found_by_verify(store: Path, name: str) -> list[str]:
    """Nothing if verify names the file; a manifest's digest that does not fit a file may be the fault of either."""
    report = outcome(lambda: verify(store))
    if isinstance(report, EmbstoreError):
        is_found = name in str(report)
    elif isinstance(report, VerifyReport):
        is_found = any(name in (finding.path, "manifest.json") for finding in report.findings)
        is_found |= name == "manifest.json" and not report.is_complete
    else:
        return [f"verify gave {report}"]
    return [] if is_found else ["not found by verify"]


def committed_only(store: Path, whole: Path) -> list[str]:
    """What an unfinished store serves that is neither refused nor the committed rows."""
    wrong = []
    expected = open_store(whole)
    try:
        opened = open_store(store, partial=True)
    except EmbstoreError:
        return []
    for row in range(NUM_ROWS):
        served = outcome(lambda row=row: (opened.ids[row], opened.rows([opened.ids[row]]).tobytes()))
        if not isinstance(served, EmbstoreError) and served != (
            expected.ids[row],
            expected.read_chunk(row // 16)[row % 16].tobytes(),
        ):
            wrong.append(f"row {row}: {served}")
    return wrong


def _never_served(store: Path, other: Path, tally: Counter, *, seed: int, count: int) -> None:
    """Each damage to a finished store: found, named, and refused by every reader that it concerns."""
    expected = readings(store, CHECKED)
    failures = []
    for name, damage in damaged(store, other, seed=seed, count=count):
        found = readings(store, CHECKED)
        problems = served_wrongly(found, expected) + found_by_verify(store, name)
        problems += [
            f"{reader} is refused without a name: {error}"
            for reader, error in found.items()
            if isinstance(error, EmbstoreError) and Path(name).name not in str(error) and name != "manifest.json"
        ]
        tally(damage.kind, losses=bool(problems))
        failures += [f"{name}, {damage.what}: {problem}" for problem in problems]
    assert not failures, "\n".join(failures)
    assert verify(store).findings == []


def test_damage_to_any_file_of_a_finished_store_is_found_and_not_served(
    named_store: Path, other_file: Path, tally: Counter
) -> None:
    _never_served(named_store, other_file, tally, seed=0, count=1)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 3))
def test_any_damage_to_any_file_of_a_finished_store_is_found_and_not_served(
    seed: int, named_store: Path, other_file: Path, tally: Counter
) -> None:
    _never_served(named_store, other_file, tally, seed=seed, count=12)


@pytest.mark.parametrize("seed", [pytest.param(0, id="short"), pytest.param(1, id="long", marks=pytest.mark.faults)])
def test_damage_to_any_file_of_an_unfinished_store_is_found_and_not_served(
    seed: int, unfinished: Path, finished_store: Path, other_file: Path, tally: Counter
) -> None:
    failures = []
    committed = {name: _committed_part(unfinished, name) for name in ROW_FILES}
    for name, damage in damaged(unfinished, other_file, seed=seed, count=12 if seed else 1):
        problems = committed_only(unfinished, finished_store) if name in (*CHUNKS, "ids.json", "aliases.json") else []
        with pytest.raises(EmbstoreError):
            open_store(unfinished)
        # nothing vouches for the rows that are still to come, and nothing reads them before they are written
        if name not in ROW_FILES or _committed_part(unfinished, name) != committed[name]:
            problems += found_by_verify(unfinished, name)
        tally(damage.kind, losses=bool(problems))
        failures += [f"{name}, {damage.what}: {problem}" for problem in problems]
    assert not failures, "\n".join(failures)
    assert verify(unfinished).findings == []


def _committed_part(store: Path, name: str) -> tuple[bytes, int] | None:
    """Header and committed rows of a row file of an unfinished store, and its length."""
    if not (store / name).is_file():
        return None
    content = (store / name).read_bytes()
    return content[: 128 + (len(content) - 128) * WINDOWS[0][1] // NUM_ROWS], len(content)


def test_a_flipped_bit_in_an_array_that_is_mapped_is_not_served(named_store: Path, tally: Counter) -> None:
    expected = readings(named_store, MAPPED)
    failures = []
    for name in (name for name in files_of(named_store) if name.endswith((".npy", "prompts.jsonl"))):
        content = (named_store / name).read_bytes()
        for damage in flipped_bits(content, random.Random(name), 2):
            damage.apply(named_store / name)
            wrong = served_wrongly(readings(named_store, MAPPED), expected)
            tally(damage.kind, losses=bool(wrong))
            failures += [f"{name}, {damage.what}: {reader}" for reader in wrong]
        (named_store / name).write_bytes(content)
    assert not failures, "\n".join(failures)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["manifest.json", "spec.json", "chunks.json", "embeddings.zarr/zarr.json"])
def test_a_flipped_bit_in_any_byte_of_a_small_file_is_found(name: str, store: Path, tally: Counter) -> None:
    content = (store / name).read_bytes()
    missed = []
    for damage in every_byte_flipped(content, random.Random(name)):
        damage.apply(store / name)
        missed += [f"{damage.what}: {problem}" for problem in found_by_verify(store, name)]
        tally(damage.kind, losses=0)
    assert not missed, "\n".join(missed)


# --- repair -----------------------------------------------------------------------------------------------------------


def _windows_of(name: str, damage: Damage, windows: set[int]) -> bool:
    """Whether these are windows that this damage can be the damage of."""
    if name in CHUNKS:
        return windows == {WINDOW_OF_CHUNK[CHUNKS.index(name)]}
    return name in ROW_FILES or not windows


def _is_foreign(name: str, damage: Damage, refusal: EmbstoreError) -> bool:
    """Whether this refuses a folder or link under a file's name: somebody's, who must remove it by hand."""
    return damage.kind.startswith("file replaced") and name in str(refusal)


def _mended(store: Path, name: str, damage: Damage, reference: dict[str, str], *, was_finished: bool) -> list[str]:
    """Repair and resume of a store that ``damage`` was done to; what is not as it should be."""
    before = tree_state(store, apart_from=ALWAYS_WRITTEN, is_opened=True)
    report = outcome(lambda: verify(store, repair=True))
    after = tree_state(store, apart_from=ALWAYS_WRITTEN, is_opened=True)
    changed = {entry for entry in before | after if before.get(entry) != after.get(entry)}
    if name in ONLY_A_NEW_BUILD:
        return [f"repair changed {entry}" for entry in changed]
    # the description of the array is made again at once; its folder then has a new entry
    allowed = {*REPAIRED, *(("embeddings.zarr", name) if name.endswith("zarr.json") else ())}
    allowed |= {name} if name in ROW_FILES and not was_finished else set()
    problems = [f"repair changed {entry}" for entry in changed - allowed]
    if not isinstance(report, VerifyReport):
        is_expected = isinstance(report, EmbstoreError) and _is_foreign(name, damage, report)
        return problems if is_expected else [*problems, f"repair gave {report}"]
    windows = {finding.window for finding in report.findings if finding.window is not None}
    if not _windows_of(name, damage, windows):
        problems.append(f"demoted windows {windows}")
    source = FakeSource()
    resumed = outcome(lambda: build_small(None, store, source=source))
    if not isinstance(resumed, BuildReport):
        is_expected = isinstance(resumed, EmbstoreError) and _is_foreign(name, damage, resumed)
        return problems if is_expected else [*problems, f"the resume gave {resumed}"]
    remaining = [] if was_finished else [1, 2]
    if source.calls != [WINDOWS[window] for window in sorted({*windows, *remaining})]:
        problems.append(f"the resume computed {source.calls}")
    if snapshot(store) != reference:
        problems.append("other bytes after the resume")
    final = tree_state(store)
    kept = {*ONLY_A_NEW_BUILD, "embeddings.zarr/zarr.json", *LINKS} if was_finished else set(ONLY_A_NEW_BUILD)
    kept |= {chunk for chunk, window in zip(CHUNKS, WINDOW_OF_CHUNK, strict=True) if window not in {*windows, *remaining}}
    kept |= set() if windows or remaining else set(ROW_FILES)
    problems += [f"the resume changed {entry}" for entry in sorted(kept - {name}) if final.get(entry) != before.get(entry)]
    return [*problems, *(f"still found: {finding}" for finding in verify(store).findings)]


def _repairs(
    original: Path,
    folder: Path,
    reference: dict[str, str],
    other: Path,
    tally: Counter,
    *,
    choose: Callable[[int, list[Damage]], Iterable[Damage]],
) -> None:
    failures = []
    untouched = other.read_bytes()
    for number, name in enumerate(files_of(original)):
        content = (original / name).read_bytes()
        for damage in choose(number, list(damages(content, random.Random(name), count=8, other=other))):
            store = Path(shutil.copytree(original, folder / "store", symlinks=True))
            damage.apply(store / name)
            problems = _mended(store, name, damage, reference, was_finished=(original / "manifest.json").exists())
            if other.read_bytes() != untouched:
                problems.append("wrote through a link")
                other.write_bytes(untouched)
            tally(damage.kind, losses=bool(problems))
            failures += [f"{name}, {damage.what}: {problem}" for problem in problems]
            shutil.rmtree(store)
    assert not failures, "\n".join(failures)


def _two_kinds(number: int, found: list[Damage]) -> Iterable[Damage]:
    """Other kinds for each file, so that all kinds come up several times over the files of a store."""
    kinds = {damage.kind: damage for damage in found}
    return [damage for turn, damage in enumerate(kinds.values()) if (turn + number) % 4 == 0]


@pytest.mark.parametrize("state", ["finished_store", "partial_store"])
def test_repair_and_a_resume_mend_what_is_damaged_and_touch_nothing_else(
    state: str, finished_store: Path, other_file: Path, tmp_path: Path, tally: Counter, request: pytest.FixtureRequest
) -> None:
    original: Path = request.getfixturevalue(state)
    _repairs(original, tmp_path, snapshot(finished_store), other_file, tally, choose=_two_kinds)


@pytest.mark.faults
@pytest.mark.parametrize("state", ["finished_store", "partial_store"])
def test_repair_and_a_resume_mend_any_damage_and_touch_nothing_else(
    state: str, finished_store: Path, other_file: Path, tmp_path: Path, tally: Counter, request: pytest.FixtureRequest
) -> None:
    original: Path = request.getfixturevalue(state)
    _repairs(original, tmp_path, snapshot(finished_store), other_file, tally, choose=lambda number, found: found)


# --- swaps ------------------------------------------------------------------------------------------------------------


def _swap(path: Path, first: tuple[int, int], second: tuple[int, int]) -> None:
    """Two stretches (start, stop) of a file change places."""
    content = path.read_bytes()
    (a, b), (c, d) = first, second
    path.write_bytes(content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:])


def test_any_two_chunks_that_were_swapped_are_found_and_made_again(
    finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    """Each has a checksum that fits its bytes: only the commit knows which chunk has which."""
    reference = snapshot(finished_store)
    for first, second in itertools.combinations(range(NUM_CHUNKS), 2):
        store = Path(shutil.copytree(finished_store, tmp_path / f"{first}-{second}", symlinks=True))
        (store / CHUNKS[first]).rename(tmp_path / "aside")
        (store / CHUNKS[second]).rename(store / CHUNKS[first])
        (tmp_path / "aside").rename(store / CHUNKS[second])
        opened = open_store(store)
        for index in (first, second):
            with pytest.raises(CorruptStoreError, match=rf"c\.{index}\.0"):
                opened.read_chunk(index)
        found = {finding.path for finding in verify(store, repair=True).findings}
        source = FakeSource()
        build_small(None, store, source=source)
        is_mended = snapshot(store) == reference
        tally("swapped chunks", losses=not (is_mended and found == {CHUNKS[first], CHUNKS[second]}))
        assert found == {CHUNKS[first], CHUNKS[second]}
        assert source.calls == [WINDOWS[window] for window in sorted({WINDOW_OF_CHUNK[first], WINDOW_OF_CHUNK[second]})]
        assert is_mended


@pytest.mark.parametrize("name", ROW_FILES)
@pytest.mark.parametrize(
    ("first", "second", "windows"),
    [((0, 32), (32, 64), [0, 1]), ((3, 4), (5, 6), [0]), ((31, 32), (32, 33), [0, 1]), ((40, 41), (69, 70), [1, 2])],
    ids=["two windows", "two rows of a window", "two rows beside each other", "rows of two windows"],
)
def test_rows_that_were_swapped_are_the_damage_of_their_windows(
    name: str,
    first: tuple[int, int],
    second: tuple[int, int],
    windows: list[int],
    store: Path,
    finished_store: Path,
    tally: Counter,
) -> None:
    width = ((store / name).stat().st_size - 128) // NUM_ROWS
    (a, b), (c, d) = (tuple(128 + row * width for row in rows) for rows in (first, second))
    _swap(store / name, (a, b), (c, d))
    findings = verify(store, repair=True).findings
    source = FakeSource()
    build_small(None, store, source=source)
    is_mended = snapshot(store) == snapshot(finished_store)
    tally("swapped rows", losses=not (is_mended and findings))
    assert {finding.path for finding in findings} == {name}
    assert sorted({finding.window for finding in findings} - {None}) == windows
    assert source.calls == [WINDOWS[window] for window in windows]
    assert is_mended


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("damage", ["deleted", "nowhere", "other", "copy", "other file", "folder"])
def test_a_damaged_link_is_found_and_never_followed(
    name: str, damage: str, store: Path, finished_store: Path, other_file: Path, tally: Counter
) -> None:
    """Readers follow the manifest, so a wrong link misleads only people; a copy of the right file misleads nobody."""
    content = (store / name).read_bytes()
    (store / name).unlink()
    if damage == "folder":
        (store / name).mkdir()
    elif damage == "copy":
        (store / name).write_bytes(content)
    elif damage == "other file":
        (store / name).write_bytes(content[::-1])
    elif damage != "deleted":
        (store / name).symlink_to("nowhere" if damage == "nowhere" else other_file)
    report = verify(store)
    found = [finding.path for finding in report.findings]
    if damage in ("deleted", "copy"):
        assert not found
        found = [note.split()[0] for note in report.notes]
    expected = load_weights(finished_store).array.tobytes()
    tally("damaged link", losses=found != [name])
    assert found == [name]
    assert load_weights(store).array.tobytes() == open_store(store).weights.tobytes() == expected
    if damage == "folder":
        with pytest.raises(StorageError, match=name):
            build_small(None, store)
        (store / name).rmdir()
    build_small(None, store)
    assert snapshot(store) == snapshot(finished_store)
    assert other_file.read_bytes().startswith(b"somebody else's bytes")
