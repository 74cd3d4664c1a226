"""Weights that were replaced: kept under name and digest, found by the runs that use them, and dropped on request only."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import embstore
from embstore.cli import app
from embstore.core.config import WeightingConfig
from embstore.core.errors import ConfigError, CorruptStoreError, IncompleteStoreError, StoreNotFoundError, WeightsError
from embstore.flow.artifact import recompute_weights
from embstore.flow.stored_weights import drop_weights, list_weights
from embstore.storage import writer as writer_module
from embstore.storage.reader import open_store
from embstore.training import DensitySampler, GroupRepeat, Weights, load_weights
from embstore.training.resumable import Resumable
from embstore.views.info import inspect, verify
from tests.support.faults import SYNCS, Killed, SystemCalls
from tests.support.stores import NUM_ROWS, build_small, small_lines, snapshot, with_density, with_weighting

pytestmark = pytest.mark.usefixtures("without_syncs")

STEEP, FLAT = WeightingConfig(gamma=3), WeightingConfig(weighting="uniform")


def names_of(store: Path) -> dict[str, str]:
    """Names and digests as the manifest has them, read without embstore."""
    return dict(json.loads((store / "manifest.json").read_bytes())["names"])


def files_of_weights(store: Path) -> set[str]:
    return {path.name for path in (store / "weights").iterdir()}


# --- kept -------------------------------------------------------------------------------------------------------------


def test_replaced_weights_stay_under_their_name_and_digest(store: Path) -> None:
    first = names_of(store)["default"]
    before = np.array(load_weights(store).array)
    recompute_weights(store, STEEP)
    recompute_weights(store, FLAT, name="flat")
    recompute_weights(store, STEEP, name="flat")
    names = names_of(store)
    flat = next(name for name in names if name.startswith("flat@"))
    assert set(names) == {"default", "flat", f"default@{first}", flat}
    assert names[f"default@{first}"] == first
    assert names["default"] == names["flat"] != first
    assert files_of_weights(store) == {f"{digest}{end}" for digest in names.values() for end in (".npy", ".json")}
    opened = open_store(store)
    for kept in (load_weights(store, name=f"default@{first}").array, opened.named_weights(f"default@{first}")):
        assert np.array_equal(kept, before)
    assert not np.array_equal(opened.weights, before)
    assert np.array_equal(np.load(store / "density_weights.npy"), opened.weights), "the link leads to the new ones"
    assert opened.named_metadata(flat)["weighting"]["weighting"] == "uniform"
    assert inspect(store, name=f"default@{first}").metadata == opened.named_metadata(f"default@{first}") != opened.metadata
    report = verify(store)
    assert (report.findings, report.notes) == ([], [])


def test_weights_that_come_again_are_what_they_were(store: Path) -> None:
    first = names_of(store)["default"]
    recompute_weights(store, STEEP)
    second = names_of(store)["default"]
    recompute_weights(store, WeightingConfig())
    assert names_of(store) == {"default": first, f"default@{first}": first, f"default@{second}": second}
    recompute_weights(store, WeightingConfig())
    assert names_of(store) == {"default": first, f"default@{first}": first, f"default@{second}": second}
    assert len(files_of_weights(store)) == 4


@pytest.mark.parametrize("how", ["other weights", "other neighbours"])
def test_a_build_with_other_settings_keeps_them_too(how: str, store: Path, small_prompts: Path) -> None:
    first, values = names_of(store)["default"], np.array(load_weights(store).array)
    config = with_weighting(gamma=2.0) if how == "other weights" else with_density(seed=9)
    build_small(small_prompts, store, config=config)
    assert names_of(store)["default"] != first
    assert np.array_equal(load_weights(store, name=f"default@{first}").array, values)
    assert verify(store).findings == []


def test_a_repair_keeps_what_was_replaced_and_the_default_that_its_resume_replaces(store: Path) -> None:
    first = names_of(store)["default"]
    recompute_weights(store, STEEP)
    steep = names_of(store)["default"]
    chunk = store / "embeddings.zarr" / "c.2.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    verify(store, repair=True)
    with pytest.raises(IncompleteStoreError):
        list_weights(store)
    build_small(None, store)  # with the settings of the first weights
    assert names_of(store) == {"default": first, f"default@{first}": first, f"default@{steep}": steep}
    assert verify(store).findings == []


def test_a_repair_leaves_out_what_is_damaged(store: Path) -> None:
    first = names_of(store)["default"]
    recompute_weights(store, STEEP)
    path = store / "weights" / f"{first}.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    report = verify(store, repair=True)
    assert [finding.path for finding in report.findings] == [f"weights/{first}.npy"]
    assert report.dropped == [f"default@{first}"]
    before = snapshot(store)
    assert set(names_of(store)) == {"default"}
    assert verify(store).findings == [], "and the store stays finished"
    build_small(None, store, config=with_weighting(gamma=3))
    assert snapshot(store) == before


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_repair_of_other_damage_leaves_out_what_is_damaged(suffix: str, store: Path) -> None:
    first = names_of(store)["default"]
    recompute_weights(store, STEEP)
    recompute_weights(store, FLAT, name="flat")
    (store / "weights" / f"{first}{suffix}").write_bytes(b"{")
    (store / "chunks.json").write_bytes(b"{}")
    report = verify(store, repair=True)
    assert report.dropped == []
    assert not verify(store).is_complete
    build_small(None, store, config=with_weighting(gamma=3))
    assert set(names_of(store)) == {"default", "flat"}
    assert (verify(store).findings, verify(store).notes) == ([], [])


def test_a_repair_never_drops_the_default(store: Path) -> None:
    recompute_weights(store, WeightingConfig(), name="twin")  # the same files
    (store / "weights" / f"{names_of(store)['twin']}.npy").write_bytes(b"{")
    assert verify(store, repair=True).dropped == []
    assert not verify(store).is_complete
    build_small(None, store)
    assert set(names_of(store)) == {"default", "twin"}, "the files are made again"
    assert verify(store).findings == []


def test_a_name_of_any_length_is_kept(store: Path) -> None:
    for name in ("x" * 200, "with space", "ümlaut", "a@b"):
        recompute_weights(store, STEEP, name=name)
        digest = names_of(store)[name]
        recompute_weights(store, FLAT, name=name)
        kept = f"{name[:183]}@{digest}"
        assert names_of(store)[kept] == digest
        assert load_weights(store, name=kept).metadata["weighting"]["gamma"] == 3  # type: ignore[index]
    assert verify(store).findings == []


def test_a_name_that_says_replaced_is_not_given_to_new_weights(store: Path) -> None:
    before = snapshot(store)
    with pytest.raises(ConfigError, match="default@0123456789abcdef"):
        recompute_weights(store, STEEP, name="default@0123456789abcdef")
    assert snapshot(store) == before


def test_more_weightings_than_a_manifest_holds_are_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recompute_weights(store, STEEP)
    before = names_of(store)
    monkeypatch.setattr(writer_module, "DOCUMENT_BYTES", (store / "manifest.json").stat().st_size + 10)
    with pytest.raises(ConfigError, match="would keep 3 weightings") as caught:
        recompute_weights(store, FLAT)
    assert "--drop" in str(caught.value.hint)
    assert names_of(store) == before
    assert verify(store).findings == []


# --- found by runs ----------------------------------------------------------------------------------------------------


def test_a_pickled_map_outlives_its_replacement(store: Path) -> None:
    weights = load_weights(store)
    content, values = pickle.dumps(weights), np.array(weights.array)
    recompute_weights(store, STEEP)
    build_small(None, store, config=with_density(seed=9))
    again = pickle.loads(content)
    assert isinstance(again.array, np.memmap)
    assert np.array_equal(again.array, values)


def test_a_dropped_map_says_what_happened(store: Path) -> None:
    content, digest = pickle.dumps(load_weights(store)), names_of(store)["default"]
    recompute_weights(store, STEEP)
    drop_weights(store, [f"default@{digest}"])
    with pytest.raises(StoreNotFoundError, match=rf"{digest}\.npy does not exist") as caught:
        pickle.loads(content)
    assert "dropped" in str(caught.value.hint)


@pytest.mark.parametrize("joined", [False, True])
def test_relative_paths_hold_in_another_folder(
    joined: bool, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    weights = load_weights(store.name)
    (tmp_path / "elsewhere").mkdir()
    content = pickle.dumps(weights.for_dataset(small_lines()) if joined else weights)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for each in (weights, pickle.loads(content), pickle.loads(pickle.dumps(weights))):
        assert each.path.is_absolute()
        assert each.path.is_file()
        assert each.store in (store, None)
    assert np.array_equal(pickle.loads(pickle.dumps(weights)).array, weights.array)
    assert len(weights.for_dataset(small_lines())) == NUM_ROWS
    assert weights.align(open_store(store).keys).path == weights.path


def test_a_relative_bare_file_holds_in_another_folder(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    with pytest.warns(UserWarning, match="bare file"):
        weights = load_weights("density_weights.npy")
    content = pickle.dumps(weights)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(pickle.loads(content).array, np.load(store / "density_weights.npy"))


def test_name_and_digest_mean_the_same_weights_before_and_after_they_are_replaced(store: Path) -> None:
    digest = load_weights(store).weighting
    assert digest == names_of(store)["default"]
    pinned = load_weights(store, name=f"default@{digest}")
    assert pinned.fingerprint == load_weights(store).fingerprint
    recompute_weights(store, STEEP)
    assert load_weights(store, name=f"default@{digest}").fingerprint == pinned.fingerprint != load_weights(store).fingerprint
    assert load_weights(store).for_dataset(small_lines()).temper(0.5).weighting == names_of(store)["default"]
    for unknown in (f"sharp@{digest}", "default@0123456789abcdef", f"default@{digest[:-1]}"):
        with pytest.raises(ConfigError, match="has no weights called"):
            load_weights(store, name=unknown)


def positional(weights: Weights) -> DensitySampler:
    return DensitySampler(weights, seed=5, positional=True)


def joined(weights: Weights) -> DensitySampler:
    return DensitySampler(weights.for_dataset(small_lines()), seed=5)


def grouped(weights: Weights) -> GroupRepeat:
    return GroupRepeat(joined(weights), 2, 5)


MADE = pytest.mark.parametrize("make", [positional, joined, grouped])
Make = Callable[[Weights], Resumable]


def called(hint: object) -> Weights:
    """The call of ``load_weights`` in a hint, made."""
    call = re.search(r"load_weights\(('.*?'), name=('.*?')\)", str(hint))
    assert call is not None, hint
    return load_weights(ast.literal_eval(call[1]), name=ast.literal_eval(call[2]))


@MADE
def test_a_run_is_resumed_with_the_weights_it_began_with(make: Make, store: Path) -> None:
    running = make(load_weights(store))
    whole = running.plan(0).tolist()
    draws = iter(running)
    seen = [next(draws) for _ in range(17)]
    state = json.loads(json.dumps(running.state_dict()))
    recompute_weights(store, STEEP)
    resumed = make(load_weights(store))
    with pytest.raises(WeightsError, match="fingerprint") as caught:
        resumed.load_state_dict(state)
    resumed = make(called(caught.value.hint))
    resumed.load_state_dict(state)
    assert seen + list(resumed) == whole


def test_a_state_that_names_no_weighting_is_known_by_its_bytes(store: Path) -> None:
    state = positional(load_weights(store)).state_dict()
    assert state.pop("weighting") == names_of(store)["default"]
    recompute_weights(store, STEEP)
    with pytest.raises(WeightsError) as caught:
        positional(load_weights(store)).load_state_dict(state)
    positional(called(caught.value.hint)).load_state_dict(state)


@MADE
def test_a_state_of_before_weightings_were_named_is_taken(make: Make, store: Path) -> None:
    state = make(load_weights(store)).state_dict()
    del state["weighting"]
    make(load_weights(store)).load_state_dict(state)


@MADE
def test_what_cannot_be_loaded_is_said(make: Make, store: Path, finished_store: Path) -> None:
    state = make(load_weights(store)).state_dict()
    recompute_weights(store, STEEP)
    cases: list[tuple[dict[str, Any], str]] = [
        ({**state, "weighting": "0123456789abcdef"}, "dropped, or belong to another store"),
        ({**state, "weighting": ["odd"]}, "dropped, or belong to another store"),
        ({**state, "weighting": names_of(store)["default"]}, "the same weights of the store: join them to the same dataset"),
    ]
    for given, expected in cases:
        with pytest.raises(WeightsError, match="fingerprint") as caught:
            make(load_weights(store)).load_state_dict(given)
        assert expected in str(caught.value.hint)
    shutil.rmtree(store / "weights")
    sampler = make(load_weights(finished_store))
    other = make(load_weights(finished_store).temper(0.5))
    with pytest.raises(WeightsError, match="fingerprint") as caught:
        other.load_state_dict(sampler.state_dict())
    assert "temper" in str(caught.value.hint)


def test_a_sampler_whose_store_is_gone_still_says_what_differs(store: Path) -> None:
    sampler = positional(load_weights(store))
    state = sampler.state_dict() | {"fingerprint": "of tomorrow"}
    shutil.rmtree(store)
    with pytest.raises(WeightsError, match="differs in fingerprint") as caught:
        sampler.load_state_dict(state)
    assert "same store" in str(caught.value.hint)


# --- dropped ----------------------------------------------------------------------------------------------------------


def test_dropped_weights_are_gone_and_all_others_stay(store: Path) -> None:
    first = names_of(store)["default"]
    recompute_weights(store, STEEP)
    recompute_weights(store, FLAT, name="flat")
    recompute_weights(store, STEEP, name="twin")
    steep = names_of(store)["default"]
    others = {name: content for name, content in snapshot(store).items() if first not in name and name != "manifest.json"}
    drop_weights(store, [f"default@{first}"])
    assert set(names_of(store)) == {"default", "flat", "twin"}
    after = snapshot(store)
    assert {name: content for name, content in after.items() if name != "manifest.json"} == others
    drop_weights(store, ["twin", "flat"])
    assert names_of(store) == {"default": steep}
    assert files_of_weights(store) == {f"{steep}.npy", f"{steep}.json"}, "the default has the same digest as twin"
    assert (verify(store).findings, verify(store).notes) == ([], [])


@pytest.mark.parametrize("name", ["default", "default@DIGEST"])
def test_the_default_is_never_dropped(name: str, store: Path) -> None:
    digest = names_of(store)["default"]
    recompute_weights(store, FLAT, name="flat")
    before = snapshot(store)
    with pytest.raises(ConfigError, match="training maps these weights") as caught:
        drop_weights(store, ["flat", name.replace("DIGEST", digest)])
    assert f"default@{digest}" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="the weights that flat has now"):
        drop_weights(store, [f"flat@{names_of(store)['flat']}"])
    assert snapshot(store) == before


def test_a_default_that_came_again_keeps_its_files_when_its_old_name_is_dropped(store: Path) -> None:
    first = names_of(store)["default"]
    recompute_weights(store, STEEP)
    recompute_weights(store, WeightingConfig())
    drop_weights(store, [f"default@{first}"])
    assert names_of(store)["default"] == first
    assert verify(store).findings == []


def test_damaged_weights_can_be_dropped_though_no_reader_opens_the_store(store: Path) -> None:
    first = names_of(store)["default"]
    recompute_weights(store, STEEP)
    (store / "weights" / f"{first}.json").write_bytes(b"{")
    (store / "weights" / f"{first}.npy").unlink()
    with pytest.raises(CorruptStoreError):
        open_store(store)
    finding = next(each for each in verify(store).findings if each.path.endswith(".npy"))
    assert finding.message.endswith(f"embstore weights {store} --drop=default@{first}")
    drop_weights(store, [f"default@{first}"])
    open_store(store)
    assert verify(store).findings == []


def test_a_drop_that_dies_anywhere_leaves_a_store_that_the_next_writer_tidies(finished_store: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(finished_store, tmp_path / "base", symlinks=True))
    first = names_of(base)["default"]
    recompute_weights(base, STEEP)

    def drop(store: Path) -> None:
        drop_weights(store, [f"default@{first}"])

    whole = Path(shutil.copytree(base, tmp_path / "whole", symlinks=True))
    with SystemCalls(root=whole).watching() as seen:
        drop(whole)
    paths = [(call.name, call.path) for call in seen.calls]
    assert paths.index(("rename", "manifest.json")) < paths.index(("unlink", f"weights/{first}.npy"))
    states = set()
    for point in [at for at, call in enumerate(seen.calls, start=1) if call.name not in SYNCS]:
        store = Path(shutil.copytree(base, tmp_path / "store", symlinks=True))
        with SystemCalls(root=store, fail_at=point).watching(), contextlib.suppress(Killed):
            drop(store)
        assert verify(store).findings == []
        load_weights(store)
        states.add((f"default@{first}" in names_of(store), len(files_of_weights(store))))
        build_small(None, store, config=with_weighting(gamma=3))
        if f"default@{first}" in names_of(store):
            drop(store)
        assert snapshot(store) == snapshot(whole), f"killed at call {point}"
        assert verify(store).notes == []
        shutil.rmtree(store)
    assert {(True, 4), (False, 4), (False, 3)} <= states, "also between the flip and the deletion"


def test_a_store_of_the_first_release_keeps_drops_and_lists(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "format" / "data" / "v1"
    store = Path(shutil.copytree(golden, tmp_path / "store", symlinks=True))
    (only,) = list_weights(store)
    assert (only.name, only.digest) == ("default", names_of(golden)["default"])
    before = json.loads((store / "manifest.json").read_bytes())
    recompute_weights(store, STEEP)
    after = json.loads((store / "manifest.json").read_bytes())
    assert before.keys() == after.keys(), "an older release reads it"
    assert load_weights(store, name=f"default@{only.digest}").fingerprint == load_weights(golden).fingerprint
    drop_weights(store, [f"default@{only.digest}"])
    assert (verify(store).findings, verify(store).notes) == ([], [])


# --- the command line -------------------------------------------------------------------------------------------------


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_the_command_line_lists_and_drops(store: Path) -> None:
    first = names_of(store)["default"]
    recompute_weights(store, STEEP)
    recompute_weights(store, FLAT, name="flat")
    code, shown = run("weights", store, "--list")
    assert code == 0
    assert [line.split()[0] for line in shown.splitlines()] == ["default", "flat", f"default@{first}"]
    assert [line.split()[1] for line in shown.splitlines()] == [
        names_of(store)[name] for name in ("default", "flat", f"default@{first}")
    ]
    inspected = run("inspect", store)[1]
    assert f"weights in this store: default, flat; 1 that were replaced, see embstore weights {store} --list" in inspected
    code, listed = run("weights", store, "--list", "--json")
    assert [entry["ess_share"] for entry in json.loads(listed)] == [
        load_weights(store, name=name).metadata["ess_share"] for name in ("default", "flat", f"default@{first}")
    ]
    code, shown = run("weights", store, "--drop", f"default@{first}", "--drop", "flat")
    assert code == 0
    assert [line.split()[0] for line in shown.splitlines()] == ["default"]
    assert set(names_of(store)) == {"default"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--drop", "default"], "training maps these weights"),
        (["--drop", "blunt"], "has no weights called 'blunt'; it has default, sharp, default@"),
        (["--list", "--k", "3"], "--list and --drop compute no weights"),
        (["--drop", "sharp", "--name", "sharp"], "--list and --drop compute no weights"),
        (["--name", "x/y"], "without a slash"),
    ],
)
def test_the_command_line_refuses_with_2_and_changes_nothing(words: list[str], expected: str, store: Path) -> None:
    recompute_weights(store, STEEP)
    recompute_weights(store, FLAT, name="sharp")
    before = snapshot(store)
    code, shown = run("weights", store, *words)
    assert code == 2
    assert expected in shown
    assert snapshot(store) == before


def test_an_unknown_name_is_2_everywhere_and_lists_those_there_are(store: Path, tmp_path: Path) -> None:
    recompute_weights(store, STEEP, name="sharp")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(line) + "\n" for line in small_lines()))
    for words in (
        ["inspect", store, "--name", "blunt"],
        ["inspect", store, "--name", "blunt", "--html", tmp_path / "r.html"],
        ["compare", store, f"{store}:blunt"],
        ["resample", store, "--dataset", lines, "--out", tmp_path / "o.jsonl", "--name", "blunt"],
    ):
        code, shown = run(*words)
        assert (code, "it has default, sharp" in shown) == (2, True), (words, shown)
    assert not (tmp_path / "r.html").exists()
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("option", ["--list", "--drop=x"])
def test_what_is_no_finished_store_is_said(option: str, unfinished: Path, tmp_path: Path) -> None:
    assert run("weights", tmp_path / "nothing", option)[0] == 1
    assert not (tmp_path / "nothing").exists()
    before = snapshot(unfinished)
    assert run("weights", unfinished, option)[0] == 6
    assert snapshot(unfinished) == before


def test_the_functions_are_public(store: Path) -> None:
    recompute_weights(store, STEEP, name="sharp")
    assert [each.name for each in embstore.list_weights(store)] == ["default", "sharp"]
    embstore.drop_weights(store, ["sharp"])
    assert [each.name for each in embstore.list_weights(store)] == ["default"]
