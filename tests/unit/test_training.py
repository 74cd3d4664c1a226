"""load_weights: what training maps is what was published, or a typed error."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.config import WeightingConfig
from embstore.core.errors import (
    ConfigError,
    CorruptStoreError,
    EmbstoreError,
    IdentityMismatchError,
    IncompleteStoreError,
    InvalidWeightsError,
    KeyMismatchError,
    LengthMismatchError,
    StoreNotFoundError,
)
from embstore.flow.artifact import recompute_weights
from embstore.training import Weights, load_weights
from tests.support.stores import NUM_ROWS


def weights_file(store: Path, suffix: str = ".npy") -> Path:
    """The array or sidecar that training maps, found without embstore."""
    manifest = json.loads((store / "manifest.json").read_bytes())
    return store / "weights" / (manifest["names"]["default"] + suffix)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x01
    path.write_bytes(content)


def test_the_published_weights_are_mapped_read_only(finished_store: Path) -> None:
    weights = load_weights(finished_store, expect_len=NUM_ROWS)
    assert isinstance(weights.array, np.memmap)
    assert weights.array.dtype == np.float32
    assert np.array_equal(weights.array, np.load(weights_file(finished_store)))
    assert len(weights) == NUM_ROWS
    assert weights.array.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert weights.metadata["n_items"] == NUM_ROWS
    assert 1 <= weights.ess() <= NUM_ROWS
    assert weights.ess() == pytest.approx(1 / np.square(weights.array.astype(np.float64)).sum(), rel=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        weights.array[0] = 1


def test_weights_pickle_by_path(finished_store: Path) -> None:
    weights = load_weights(finished_store)
    content = pickle.dumps(weights)
    assert np.asarray(weights.array).tobytes() not in content
    again = pickle.loads(content)
    assert isinstance(again, Weights)
    assert isinstance(again.array, np.memmap)
    assert np.array_equal(again.array, weights.array)
    assert (again.path, again.fingerprint, again.metadata) == (weights.path, weights.fingerprint, weights.metadata)


def test_other_weights_are_kept_by_name(store: Path) -> None:
    before = load_weights(store)
    recompute_weights(store, WeightingConfig(gamma=4.0), name="sharp")
    sharp = load_weights(store, name="sharp")
    assert sharp.ess() < before.ess()
    assert sharp.fingerprint != before.fingerprint == load_weights(store).fingerprint
    with pytest.raises(ConfigError, match="'blunt'; it has default, sharp"):
        load_weights(store, name="blunt")


def drop_from_manifest(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_bytes())
    del manifest["files"][str(weights_file(store).relative_to(store))]
    (store / "manifest.json").write_text(json.dumps(manifest))


def another_version(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_bytes())
    (store / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def other_values(path: Path) -> None:
    """A well-formed vector of weights that is not the published one."""
    np.save(path, np.full(NUM_ROWS, 1 / NUM_ROWS, dtype=np.float32))


@pytest.mark.parametrize(
    ("damage", "kind", "complaint"),
    [
        (lambda store: flip(weights_file(store), -1), CorruptStoreError, "sha256"),
        (lambda store: flip(weights_file(store), 3), CorruptStoreError, "not a plain .npy array"),
        (lambda store: other_values(weights_file(store)), CorruptStoreError, "sha256"),
        (lambda store: cut(weights_file(store), -4), CorruptStoreError, "404 bytes"),
        (lambda store: cut(weights_file(store), 0), CorruptStoreError, "not a plain .npy array"),
        (lambda store: weights_file(store).unlink(), CorruptStoreError, "is missing"),
        (lambda store: np.save(weights_file(store), np.ones(3, np.float32)), CorruptStoreError, "manifest says 70"),
        (lambda store: flip(weights_file(store, ".json"), 20), CorruptStoreError, "sha256"),
        (lambda store: weights_file(store, ".json").unlink(), CorruptStoreError, "is missing"),
        (lambda store: cut(store / "manifest.json", 100), CorruptStoreError, "manifest.json"),
        (lambda store: (store / "manifest.json").write_text("{}"), CorruptStoreError, "manifest.json"),
        (drop_from_manifest, CorruptStoreError, "does not list weights/"),
        (another_version, IdentityMismatchError, "format_version"),
        (lambda store: (store / "manifest.json").unlink(), IncompleteStoreError, "is not finished"),
    ],
)
def test_damage_is_a_typed_error(
    store: Path, damage: Callable[[Path], object], kind: type[EmbstoreError], complaint: str
) -> None:
    damage(store)
    with pytest.raises(kind, match=complaint) as caught:
        load_weights(store)
    assert caught.value.hint


def test_an_unfinished_store_and_none_at_all_are_told_apart(unfinished: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteStoreError) as caught:
        load_weights(unfinished)
    assert caught.value.hint == f"run embstore build --resume --out {unfinished}"
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(StoreNotFoundError):
            load_weights(path)


def test_less_is_checked_only_when_asked(store: Path) -> None:
    flip(weights_file(store), -1)
    assert len(load_weights(store, verify="shape")) == len(load_weights(store, verify="off")) == NUM_ROWS
    np.save(weights_file(store), np.full(NUM_ROWS, 1 / NUM_ROWS))
    with pytest.raises(InvalidWeightsError, match="float64"):
        load_weights(store, verify="shape")


@pytest.mark.parametrize("length", [NUM_ROWS - 1, NUM_ROWS + 1, 0])
def test_a_dataset_of_another_length_is_refused(finished_store: Path, length: int) -> None:
    with pytest.raises(LengthMismatchError, match=f"{NUM_ROWS} weights, the dataset has {length} items"):
        load_weights(finished_store, expect_len=length)


def test_keys_must_be_the_stores_in_its_order(finished_store: Path) -> None:
    keys = np.load(finished_store / "keys.npy")
    assert len(load_weights(finished_store, expect_keys=keys)) == NUM_ROWS
    assert len(load_weights(finished_store, expect_keys=[int(key) for key in keys])) == NUM_ROWS
    swapped = keys.copy()
    swapped[[4, 9]] = swapped[[9, 4]]
    with pytest.raises(KeyMismatchError, match="the same prompts in another order; first at position 4"):
        load_weights(finished_store, expect_keys=swapped)
    other = keys.copy()
    other[7] += 1
    with pytest.raises(KeyMismatchError, match="other prompts; first at position 7"):
        load_weights(finished_store, expect_keys=other)
    with pytest.raises(LengthMismatchError):
        load_weights(finished_store, expect_keys=keys[:-1])


@pytest.mark.parametrize("damage", [lambda path: flip(path, -1), lambda path: cut(path, 90), lambda path: path.unlink()])
def test_damaged_keys_are_not_taken_for_other_prompts(store: Path, damage: Callable[[Path], None]) -> None:
    keys = np.load(store / "keys.npy")
    damage(store / "keys.npy")
    with pytest.raises(CorruptStoreError, match=r"keys\.npy"):
        load_weights(store, expect_keys=keys)


def bare(path: Path) -> Weights:
    with pytest.warns(UserWarning, match="no manifest says which prompts"):
        return load_weights(path)


def test_a_bare_file_is_mapped_with_a_warning(finished_store: Path, tmp_path: Path) -> None:
    values = np.array([0.25, 0.0, 0.75], dtype=np.float32)
    np.save(tmp_path / "w.npy", values)
    weights = bare(tmp_path / "w.npy")
    assert np.array_equal(weights.array, values)
    assert weights.metadata == {}
    np.save(tmp_path / "v.npy", values[::-1])
    assert bare(tmp_path / "v.npy").fingerprint != weights.fingerprint
    linked = bare(finished_store / "density_weights.npy")
    assert np.array_equal(linked.array, load_weights(finished_store).array)
    with pytest.warns(UserWarning, match="bare"), pytest.raises(ConfigError, match="has no keys"):
        load_weights(tmp_path / "w.npy", expect_keys=[1, 2, 3])


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([0.5, 0.75, -0.25], "weight 2 is -0.25"),
        ([0.5, np.nan, 0.5], "weight 1 is nan"),
        ([np.inf, 0.0], "weight 0 is inf"),
        ([1.5, 0.5], "sums to 2"),
        ([0.0, 0.0], "sum to 0"),
        ([0.5, 0.4999], "sums to 0.99"),
        ([], "non-empty"),
        ([[0.5, 0.5]], r"shape \(1, 2\)"),
        (0.5, r"shape \(\)"),
    ],
)
def test_a_bare_file_must_hold_weights(values: object, complaint: str, tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.array(values, dtype=np.float32))
    with pytest.warns(UserWarning, match="bare"), pytest.raises(InvalidWeightsError, match=complaint):
        load_weights(tmp_path / "w.npy")


class Trap:
    """A pickle of this would raise what no test expects."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


def write_pickled_array(path: Path) -> None:
    np.save(path, np.array([Trap(), Trap()], dtype=object), allow_pickle=True)


def write_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weights=np.array([0.5, 0.5], dtype=np.float32))


@pytest.mark.parametrize(
    "write",
    [
        write_pickled_array,
        lambda path: path.write_bytes(pickle.dumps(Trap())),
        write_archive,
        lambda path: path.write_text("0.5 0.5\n"),
    ],
)
def test_a_bare_file_that_is_no_plain_array_is_refused(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "w.npy")
    with pytest.warns(UserWarning, match="bare"), pytest.raises(CorruptStoreError):
        load_weights(tmp_path / "w.npy")
