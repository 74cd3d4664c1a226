"""A store from a stranger: whatever its bytes, every command ends in a result or a typed error, and touches nothing else.

The attacker recomputes every checksum and digest (tests/support/forged.py). The short version is deterministic; the complete
one, ``-m faults``, draws other examples at each run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embstore.core.errors import CorruptStoreError, EmbstoreError
from embstore.storage.reader import open_store
from embstore.training import load_weights
from embstore.views.info import verify
from tests.support.forged import (
    HEADERS,
    damaged,
    dumps,
    journal_of,
    manifest_of,
    mutated,
    reseal,
    reseal_manifest,
    write_journal,
)
from tests.support.hostile import COMMANDS, FILE_KINDS, KINDS, READERS, WRITERS, Arena
from tests.support.tally import Counter

pytestmark = pytest.mark.usefixtures("without_syncs")

Draw = Callable[[st.SearchStrategy[Any]], Any]
Attack = Callable[[Path, Draw], object]

SHORT, COMPLETE = 5, 60  # examples of each attack on each store
LINKS = ("density_weights.npy", "embeddings_metadata.json")


@pytest.fixture(params=["finished", "unfinished"])
def arena(request: pytest.FixtureRequest, finished_store: Path, partial_store: Path, tmp_path: Path) -> Arena:
    pristine = finished_store if request.param == "finished" else partial_store
    return Arena(pristine=pristine, root=tmp_path / "arena")


# --- attacks: a valid copy of a store is changed in place ------------------------------------------------------------


def _journal(store: Path, draw: Draw) -> None:
    lines = mutated(journal_of(store), draw)
    write_journal(store, lines if isinstance(lines, list) else [lines])


def _renumbered_journal(store: Path, draw: Draw) -> None:
    """Records doubled, left out or in another order, with the sequence numbers that fit."""
    lines = journal_of(store)
    order = draw(st.lists(st.sampled_from(range(1, len(lines))), max_size=8))
    chosen = [lines[0], *(mutated(lines[index], draw) if draw(st.booleans()) else dict(lines[index]) for index in order)]
    write_journal(store, [line | {"seq": seq} if isinstance(line, dict) else line for seq, line in enumerate(chosen)])


def _manifest(store: Path, draw: Draw) -> None:
    path = store / "manifest.json"
    if path.exists():
        path.write_bytes(dumps(mutated(json.loads(path.read_bytes()), draw)))
    else:  # an unfinished store with somebody's idea of a manifest
        path.write_bytes(dumps(draw(st.sampled_from([{}, [], {"format_version": 1, "rows": 70}]))))


def _document(pattern: str) -> Attack:
    def attack(store: Path, draw: Draw) -> None:
        found = sorted(store.glob(pattern))
        for path in found:
            path.write_bytes(dumps(mutated(json.loads(path.read_bytes()), draw)))
        reseal(store) if pattern == "spec.json" else reseal_manifest(store)

    return attack


def _row(store: Path, draw: Draw) -> None:
    path = store / "prompts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    row = draw(st.sampled_from([0, 30, 65, 69]))
    line = dumps(mutated(json.loads(lines[row]), draw)) if draw(st.booleans()) else damaged(lines[row], draw)
    path.write_bytes(b"".join([*lines[:row], line.rstrip(b"\n") + b"\n", *lines[row + 1 :]]))
    reseal_manifest(store)


def _array(store: Path, draw: Draw) -> Path:
    return draw(st.sampled_from(sorted(path for path in store.rglob("*.npy") if not path.is_symlink())))


def _array_header(store: Path, draw: Draw) -> None:
    path = _array(store, draw)
    content = path.read_bytes()
    header = draw(st.sampled_from(HEADERS)) if draw(st.booleans()) else damaged(content[:128], draw)
    path.write_bytes(header + content[128:])
    reseal_manifest(store)


def _array_values(store: Path, draw: Draw) -> None:
    path = _array(store, draw)
    content = bytearray(path.read_bytes())
    place = 128 + 4 * draw(st.integers(0, (len(content) - 136) // 4))
    content[place : place + 8] = draw(st.sampled_from([b"\xff" * 8, b"\x7f" * 8, b"\0" * 8, b"\0\0\x80\xff\0\0\x80\x7f"]))
    path.write_bytes(content)
    reseal(store)


def _chunk(store: Path, draw: Draw) -> None:
    path = draw(st.sampled_from(sorted(store.glob("embeddings.zarr/c.*"))))
    content = path.read_bytes()
    if draw(st.booleans()):  # the frame's own sizes: typesize, bytes, block, compressed bytes
        size = draw(st.sampled_from([0, 1, 16, 2048, 2**31 - 1, 2**32 - 1]))
        place = draw(st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16]))
        content = content[:place] + size.to_bytes(4, "little") + content[place + 4 :]
    else:
        content = damaged(content, draw)
    path.write_bytes(content)
    reseal(store)


def _bytes(store: Path, draw: Draw) -> None:
    path = draw(st.sampled_from(sorted(path for path in store.rglob("*") if path.is_file() and not path.is_symlink())))
    path.write_bytes(damaged(path.read_bytes(), draw))
    if path.name not in ("journal.jsonl", "manifest.json", "spec.json", ".lock") and draw(st.booleans()):
        reseal_manifest(store)


def _exchange(store: Path, draw: Draw) -> None:
    files = sorted(path for path in store.rglob("*") if path.is_file() and not path.is_symlink())
    first, second = draw(st.sampled_from(files)), draw(st.sampled_from(files))
    first.write_bytes(second.read_bytes())
    if {"journal.jsonl", "manifest.json", "spec.json"}.isdisjoint({first.name}):
        reseal_manifest(store)


ATTACKS: Mapping[str, Attack] = {
    "hostile journal": _journal,
    "hostile journal, renumbered": _renumbered_journal,
    "hostile manifest": _manifest,
    "hostile spec": _document("spec.json"),
    "hostile array metadata": _document("embeddings.zarr/zarr.json"),
    "hostile chunk table": _document("chunks.json"),
    "hostile ids": _document("ids.json"),
    "hostile aliases": _document("aliases.json"),
    "hostile metadata": _document("weights/*.json"),
    "hostile neighbours": _document("neighbors/*/spec.json"),
    "hostile prompts in a store": _row,
    "hostile array header": _array_header,
    "hostile array values": _array_values,
    "hostile chunk": _chunk,
    "hostile bytes in any file": _bytes,
    "one file of a store in another's place": _exchange,
}


def _fuzz(arena: Arena, fault: str, tally: Counter, *, examples: int, derandomize: bool) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=derandomize,
        print_blob=not derandomize,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def ends_in_a_result_or_a_typed_error(data: st.DataObject) -> None:
        store = arena.fresh()
        ATTACKS[fault](store, data.draw)
        writer = data.draw(st.sampled_from(sorted(WRITERS)))
        found = arena.problems(store, {**READERS, writer: WRITERS[writer]})
        tally(fault, losses=bool(found))
        assert not found, "\n".join(found)

    ends_in_a_result_or_a_typed_error()


@pytest.mark.parametrize("fault", ATTACKS)
def test_a_hostile_store_ends_in_a_result_or_a_typed_error(fault: str, arena: Arena, tally: Counter) -> None:
    _fuzz(arena, fault, tally, examples=SHORT, derandomize=True)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ATTACKS)
def test_many_hostile_stores_end_in_a_result_or_a_typed_error(fault: str, arena: Arena, tally: Counter) -> None:
    _fuzz(arena, fault, tally, examples=COMPLETE, derandomize=False)


def test_the_attacks_start_from_stores_that_are_sound(arena: Arena) -> None:
    """What is resealed without a change is as good as before: a refusal is never that of a clumsy forgery."""
    store = arena.fresh()
    reseal(store)
    assert [finding for finding in verify(store).findings if finding.path != "manifest.json"] == []
    opened = open_store(store, partial=True)
    assert opened.read_chunk(0).shape == (16, 64)
    assert arena.problems(store, COMMANDS) == []


# --- other things than files -----------------------------------------------------------------------------------------


def _names(store: Path) -> list[str]:
    """Everything in a store, and its folders that come later."""
    names = [path.relative_to(store).as_posix() for path in sorted(store.rglob("*"))]
    return list(dict.fromkeys([*names, "work", "weights", "neighbors"]))


def _put(arena: Arena, name: str, put: Callable[[Path, str], None]) -> Path:
    store = arena.fresh()
    if not (store / name).exists():
        (store / name).mkdir()
    put(store, name)
    return store


def _is_hidden(arena: Arena, name: str, kind: str) -> bool:
    """Whether verify may say nothing: what no reader opens, and folders that are still as they may be."""
    if name in (*LINKS, ".lock", "runs.jsonl", "work") or not (arena.pristine / name).exists():
        return True
    original = arena.pristine / name
    return (original.is_dir() and kind == "an empty folder") or (original.stat().st_size == 0 and kind == "an empty file")


def _judge_kinds(arena: Arena, cases: list[tuple[str, str]], tally: Counter) -> None:
    found = []
    for name, kind in cases:
        store = _put(arena, name, KINDS[kind])
        problems = [] if _is_hidden(arena, name, kind) or not _passes(store) else ["verify passed it"]
        problems += arena.problems(store, COMMANDS)
        tally(f"{kind} in the place of a file or folder", losses=bool(problems))
        found += [f"{kind} as {name}: {problem}" for problem in problems]
    assert not found, "\n".join(found)


def _passes(store: Path) -> bool:
    try:
        return not verify(store).findings
    except EmbstoreError:
        return False


def test_nothing_is_followed_waited_for_or_deleted_in_the_place_of_a_file(arena: Arena, tally: Counter) -> None:
    """Each name in one way, another for each; folders and files that are written in place as links."""
    kinds = sorted(KINDS)
    cases = [(name, kinds[index % len(kinds)]) for index, name in enumerate(_names(arena.pristine))]
    written = ("embeddings.zarr", "weights", "neighbors", "work", "coordinates.npy", "journal.jsonl", ".lock", "runs.jsonl")
    cases += [(name, "a link to the same thing outside") for name in written if (arena.outside / name).exists()]
    _judge_kinds(arena, cases, tally)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_followed_in_the_place_of_any_file(kind: str, arena: Arena, tally: Counter) -> None:
    _judge_kinds(arena, [(name, kind) for name in _names(arena.pristine)], tally)


def test_training_never_maps_weights_through_a_link(finished_store: Path, tmp_path: Path) -> None:
    arena = Arena(pristine=finished_store, root=tmp_path / "arena")
    for name in ("weights", "manifest.json", *(f"weights/{path.name}" for path in (finished_store / "weights").iterdir())):
        store = _put(arena, name, KINDS["a link to the same thing outside"])
        with pytest.raises(CorruptStoreError, match="is a link or not a regular file"):
            load_weights(store)


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_terabyte_that_takes_no_disk_takes_no_memory(kind: str, arena: Arena, tally: Counter) -> None:
    stores = []
    for name in _names(arena.pristine):
        if (arena.pristine / name).is_file() and name not in LINKS:
            stores.append(arena.root / f"store-{len(stores)}")
            _put(arena, name, FILE_KINDS[kind]).rename(stores[-1])
    _assert_bounded(stores, tally, kind)


def _claim_rows(store: Path, rows: int) -> None:
    """Every record says ``rows``, and arrays of that many rows lie there as holes."""
    lines = journal_of(store)
    spec = json.loads((store / "spec.json").read_bytes()) | {"rows": rows, "window_rows": 1 << 14, "chunk_rows": 1 << 12}
    (store / "spec.json").write_text(json.dumps(spec))
    for line in lines:
        if line["record"] == "prompts":
            line |= {"rows": rows, "lines": rows + 3}
    write_journal(store, [line for line in lines if line["record"] != "window"])
    lines = journal_of(store)
    write_journal(store, [line | {"seq": seq} for seq, line in enumerate(lines)])
    reseal_manifest(store)
    if not (store / "manifest.json").exists():
        return
    manifest = manifest_of(store) | {"rows": rows}
    for name in manifest["files"]:
        path = store / name
        if path.suffix == ".npy" and path.name != "basis.npy":
            content = path.read_bytes()
            header = content[:128].replace(b"(70,", f"({rows},".encode()).replace(b"(73,", f"({rows + 3},".encode())
            head, _, _ = header.partition(b"}")
            header = head + b"}" + b" " * (127 - len(head) - 1) + b"\n"
            width = (len(content) - 128) // (73 if "line_rows" in name else 70)
            with path.open("wb") as file:
                file.write(header)
                file.truncate(128 + width * (rows + 3 if "line_rows" in name else rows))
            manifest["files"][name]["bytes"] = path.stat().st_size
    (store / "manifest.json").write_text(json.dumps(manifest))


def test_a_claim_of_two_billion_rows_takes_no_memory(arena: Arena, tally: Counter) -> None:
    store = arena.fresh()
    _claim_rows(store, (1 << 31) - 1)
    # reading a terabyte of holes takes long, not memory: only commands that need no digest of it
    _assert_bounded(
        [store], tally, "two billion rows that are not there", without=("verify", "load_weights", "load_weights with keys")
    )


def _assert_bounded(stores: list[Path], tally: Counter, fault: str, *, without: tuple[str, ...] = ()) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.support.hostile",
        json.dumps([str(store) for store in stores]),
        json.dumps(without),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    tally(fault, cycles=len(stores), losses=len(report["problems"]))
    assert not report["problems"], "\n".join(report["problems"])
    assert report["peak_mebibytes"] < 512


# --- what was found, kept as examples --------------------------------------------------------------------------------


def test_values_that_no_row_has_are_damage_whatever_their_checksum(arena: Arena) -> None:
    """Found: a coordinate that is NaN or huge, with a crc that fits, went through a resume into neighbours and weights."""
    for name in ("coordinates.npy", "residuals.npy"):
        for value in (b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"):
            store = arena.fresh()
            content = bytearray((store / name).read_bytes())
            content[128 : 128 + 4] = value
            (store / name).write_bytes(content)
            reseal(store)
            assert (name, 0) in {(finding.path, finding.window) for finding in verify(store).findings}
            assert arena.problems(store, COMMANDS) == []


def test_a_basis_of_no_numbers_never_becomes_metadata_that_is_no_json(arena: Arena) -> None:
    store = arena.fresh()
    content = bytearray((store / "basis.npy").read_bytes())
    content[128:] = b"\xff" * (len(content) - 128)
    (store / "basis.npy").write_bytes(content)
    reseal(store)
    assert arena.problems(store, COMMANDS) == []


def test_weights_of_a_journal_without_prompts_are_refused(finished_store: Path, tmp_path: Path) -> None:
    arena = Arena(pristine=finished_store, root=tmp_path / "arena")
    store = arena.fresh()
    write_journal(store, journal_of(store)[:1])
    with pytest.raises(CorruptStoreError, match="does not commit the prompts"):
        WRITERS["weights"](store)
    assert arena.problems(store, COMMANDS) == []


def test_a_fifo_in_the_place_of_scratch_is_not_waited_for(arena: Arena) -> None:
    """Found: the folder was deleted by opening it first."""
    for name in ("work", "neighbors/stale"):
        store = arena.fresh()
        (store / name).parent.mkdir(exist_ok=True)
        KINDS["a FIFO"](store, name)
        assert arena.problems(store, WRITERS) == []
        assert name != "work" or not (store / name).is_fifo()


def test_coordinates_of_no_numbers_give_no_neighbours(finished_store: Path, tmp_path: Path) -> None:
    """Found: a resume of a finished store searched again, among coordinates that verify had not yet seen."""
    arena = Arena(pristine=finished_store, root=tmp_path / "arena")
    store = arena.fresh()
    content = bytearray((store / "coordinates.npy").read_bytes())
    content[128 : 128 + 8] = b"\xff" * 8
    (store / "coordinates.npy").write_bytes(content)
    reseal(store)
    assert arena.problems(store, {"resume": WRITERS["resume"]}) == []
