"""Weights joined to a dataset by content or id, and tempered: compared with a dictionary over the store's own lines."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from embstore.core.errors import (
    ConfigError,
    CorruptStoreError,
    InvalidWeightsError,
    KeyMismatchError,
    LengthMismatchError,
    OrderMismatchError,
    PromptError,
)
from embstore.training import (
    DensitySampler,
    GroupRepeat,
    importance_weights,
    load_weights,
    prompt_keys,
    resample_dataset,
    resample_indices,
)
from embstore.training import torch as torch_samplers
from tests.support.stores import NUM_ROWS, small_lines


def text_of(line: dict[str, Any]) -> str:
    """What tells prompts apart, read without embstore."""
    return json.dumps(line["messages"]) if "messages" in line else " ".join(line["prompt"].split())


def weight_of(store: Path) -> dict[str, float]:
    """Weight of each prompt of the small store, by its content."""
    array = load_weights(store).array
    return {text_of(line): float(array[row]) for row, line in enumerate(small_lines())}


def shuffled_lines() -> list[dict[str, Any]]:
    lines = small_lines()
    random.Random(5).shuffle(lines)
    return lines


def test_keys_are_those_of_the_store(finished_store: Path) -> None:
    assert np.array_equal(prompt_keys(small_lines()), np.load(finished_store / "keys.npy"))
    texts = [line["prompt"] for line in small_lines() if "prompt" in line]
    assert np.array_equal(prompt_keys(texts), prompt_keys([{"prompt": f"  {text}\n"} for text in texts]))
    with pytest.raises(PromptError, match="item 1 has no prompt: the prompt is empty"):
        prompt_keys(["one", " "])


def test_weights_of_a_store_are_drawn_from_only_after_a_join(finished_store: Path, tmp_path: Path) -> None:
    """Whatever makes draws of weights asks in which order they are; an array's owner knows."""
    stored = load_weights(finished_store)
    table = datasets.Dataset.from_list([{"number": number} for number in range(NUM_ROWS)])
    draws: list[Callable[..., object]] = [
        DensitySampler,
        torch_samplers.DensitySampler,
        lambda weights, **order: GroupRepeat(DensitySampler(weights, **order), 2),
        resample_indices,
        lambda weights, **order: resample_dataset(table, weights, **order),
        importance_weights,
    ]
    np.save(tmp_path / "w.npy", stored.array)
    with pytest.warns(UserWarning, match="bare"):
        bare = load_weights(tmp_path / "w.npy")
    keys = np.load(finished_store / "keys.npy")
    for draw in draws:
        for unjoined in (stored, stored.temper(0.5), load_weights(finished_store, expect_len=NUM_ROWS)):
            with pytest.raises(ConfigError, match=f"order of the rows of {finished_store}") as caught:
                draw(unjoined)
            hint = str(caught.value.hint)
            assert f"load_weights({str(finished_store)!r}).for_dataset(dataset)" in hint
            assert "positional=True" in hint
            draw(unjoined, positional=True)
        in_order = load_weights(finished_store, expect_keys=keys)
        for known in (
            stored.array,
            stored.array.tolist(),
            bare,
            stored.for_dataset(small_lines()),
            in_order,
            in_order.temper(2),
        ):
            draw(known)


def test_an_order_that_was_compared_survives_pickling(finished_store: Path) -> None:
    weights = load_weights(finished_store, expect_keys=np.load(finished_store / "keys.npy"))
    DensitySampler(pickle.loads(pickle.dumps(weights)))
    with pytest.raises(ConfigError, match="not joined"):
        DensitySampler(pickle.loads(pickle.dumps(load_weights(finished_store))))


def test_a_shuffled_part_of_the_prompts_gets_its_own_weights(finished_store: Path) -> None:
    lines, expected = shuffled_lines()[:40], weight_of(finished_store)
    weights = load_weights(finished_store).for_dataset(lines)
    total = sum(expected[text_of(line)] for line in lines)
    assert weights.array == pytest.approx([expected[text_of(line)] / total for line in lines], rel=1e-6)
    assert weights.array.dtype == np.float32
    assert weights.array.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    aligned = load_weights(finished_store).align(prompt_keys(lines))
    assert np.array_equal(aligned.array, weights.array)
    assert weights.steps == ("align(on_missing='error', duplicates='repeat')",)
    with pytest.raises(ConfigError, match="joined to a dataset already"):
        weights.align(prompt_keys(lines))


def test_a_hugging_face_dataset_is_joined_by_any_column(finished_store: Path) -> None:
    lines = [line for line in shuffled_lines() if "prompt" in line]
    expected = load_weights(finished_store).for_dataset(lines).array
    texts = [line["prompt"] for line in lines]
    table = datasets.Dataset.from_dict({"number": list(range(len(texts))), "question": texts})
    weights = load_weights(finished_store).for_dataset(table, key_column="question")
    assert np.array_equal(weights.array, expected)
    chats = [line for line in small_lines() if "messages" in line]
    for column in ("messages", "prompt", "conversation"):
        table = datasets.Dataset.from_dict({column: [line["messages"] for line in chats]})
        joined = load_weights(finished_store).for_dataset(table, key_column=column)
        assert np.array_equal(joined.array, load_weights(finished_store).for_dataset(chats).array)
    prefixes = [{"prefix": {"messages": line["messages"]}} for line in chats]
    assert np.array_equal(prompt_keys(prefixes), prompt_keys(chats))
    with pytest.raises(ConfigError, match="no column text; it has number, question"):
        load_weights(finished_store).for_dataset(
            datasets.Dataset.from_dict({"number": [1], "question": ["a"]}), key_column="text"
        )


def test_ids_of_the_prompts_file_and_of_rows_both_join(finished_store: Path) -> None:
    weights = load_weights(finished_store)
    ids = json.loads((finished_store / "ids.json").read_text())
    assert np.allclose(weights.align(ids[::-1]).array, weights.array[::-1], rtol=1e-6)
    table = datasets.Dataset.from_dict({"uid": ["given-1", "alias-3", "given-0"]})
    rows = [ids.index("given-1"), 3, ids.index("given-0")]
    expected = weights.array[rows] / weights.array[rows].sum(dtype=np.float64)
    assert weights.for_dataset(table, id_column="uid").array == pytest.approx(expected, rel=1e-6)
    with pytest.raises(KeyMismatchError, match=r"1 of 2 items .*: 1 not in the store, the first is item 1, id 'nobody'"):
        weights.align(["given-1", "nobody"])
    with pytest.raises(ConfigError, match="not both"):
        weights.for_dataset(table, key_column="uid", id_column="uid")


def test_items_that_are_no_row_are_refused_unless_a_policy_is_named(finished_store: Path) -> None:
    weights, lines = load_weights(finished_store), small_lines()[:8]
    given = [*lines[:5], {"prompt": "nobody built this"}, *lines[5:], {"prompt": " "}]
    known = np.array([0, 1, 2, 3, 4, 6, 7, 8])
    with pytest.raises(
        KeyMismatchError,
        match=r"2 of 10 items have no row in .*70 rows.*: 1 not in the store, "
        r"the first is item 5, 'nobody built this'; 1 without a prompt, the first is item 9: the prompt is empty",
    ) as caught:
        weights.for_dataset(given)
    assert "on_missing='drop'" in str(caught.value.hint)
    original = weights.array[:8].astype(np.float64)
    for policy, multiple in (("drop", 0.0), ("mean", 1.0), (0.25, 0.25), (3, 3.0)):
        joined = weights.for_dataset(given, on_missing=policy).array.astype(np.float64)  # type: ignore[arg-type]
        assert joined[known] / joined[known].sum() == pytest.approx(original / original.sum(), rel=1e-5)
        assert joined[[5, 9]] == pytest.approx([multiple * joined[known].mean()] * 2, rel=1e-5)
    with pytest.raises(
        KeyMismatchError, match=r"1 of 1 items .* without a prompt, the first is item 0: the prompt is empty"
    ):
        weights.for_dataset([""], on_missing="mean")
    for wrong in ("ignore", -1.0, float("nan")):
        with pytest.raises(ConfigError, match="on_missing"):
            weights.for_dataset(given, on_missing=wrong)  # type: ignore[arg-type]


def test_many_items_of_one_row_repeat_or_divide_its_weight(finished_store: Path) -> None:
    weights = load_weights(finished_store)
    pairs = [0, 0, 0, 5, 9, 9]
    keys = np.load(finished_store / "keys.npy")[pairs]
    original = weights.array.astype(np.float64)
    for duplicates, shares in (("repeat", [1, 1, 1, 1, 1, 1]), ("divide", [1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 2])):
        expected = original[pairs] * np.array(shares)
        joined = weights.align(keys, duplicates=duplicates)  # type: ignore[arg-type]
        assert joined.array == pytest.approx(expected / expected.sum(), rel=1e-6)
    with pytest.raises(ConfigError, match="duplicates"):
        weights.align(keys, duplicates="share")  # type: ignore[arg-type]


def test_a_mismatch_names_lengths_position_keys_and_whether_only_the_order_differs(finished_store: Path) -> None:
    keys = np.load(finished_store / "keys.npy")
    with pytest.raises(
        OrderMismatchError, match=f"position 0: the store has key {keys[0]:016x}, given {keys[-1]:016x}"
    ) as caught:
        load_weights(finished_store, expect_keys=keys[::-1])
    assert ".align(keys)" in str(caught.value.hint)
    other = keys.copy()
    other[3] += 1
    with pytest.raises(KeyMismatchError, match="other prompts; first at position 3") as found:
        load_weights(finished_store, expect_keys=other)
    assert not isinstance(found.value, OrderMismatchError)
    with pytest.raises(LengthMismatchError, match=r"70 rows, expect_keys has 69; first at position 2: the store has key"):
        load_weights(finished_store, expect_keys=np.delete(keys, 2))
    with pytest.raises(LengthMismatchError, match="the shorter one is a prefix of the other"):
        load_weights(finished_store, expect_keys=keys[:-1])
    with pytest.raises(LengthMismatchError) as short:
        load_weights(finished_store, expect_len=NUM_ROWS + 2)
    assert ".for_dataset(dataset) instead of expect_len" in str(short.value.hint)


def test_two_rows_with_one_key_are_not_told_apart_by_guessing(store: Path) -> None:
    keys = np.load(store / "keys.npy")
    keys[8] = keys[50]
    republish_keys(store, keys)
    weights = load_weights(store)
    assert len(weights.align(keys[:8])) == 8  # the others are unharmed
    with pytest.raises(KeyMismatchError, match="two rows of the store have the key") as caught:
        weights.align(keys[8:9])
    assert "ids" in str(caught.value.hint)


def republish_keys(store: Path, keys: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
    """Other keys, with a manifest that lists them."""
    import hashlib

    np.save(store / "keys.npy", keys)
    manifest = json.loads((store / "manifest.json").read_bytes())
    content = (store / "keys.npy").read_bytes()
    manifest["files"]["keys.npy"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (store / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_keys_or_ids_are_not_joined(store: Path) -> None:
    weights = load_weights(store)
    for name, join in (("keys.npy", lambda: weights.align([1])), ("aliases.json", lambda: weights.align(["a"]))):
        content = bytearray((store / name).read_bytes())
        content[-3] ^= 1
        (store / name).write_bytes(content)
        with pytest.raises(CorruptStoreError, match=name):
            join()


def test_bare_weights_cannot_be_joined(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.array([0.5, 0.5], dtype=np.float32))
    with pytest.warns(UserWarning, match="bare"):
        weights = load_weights(tmp_path / "w.npy")
    with pytest.raises(ConfigError, match="bare file, which has no keys"):
        weights.align([1, 2])


def test_tempering_is_the_power_of_the_weights(finished_store: Path) -> None:
    weights = load_weights(finished_store)
    original = weights.array.astype(np.float64)
    for alpha in (0.0, 0.5, 1.0, 3.0):
        expected = original**alpha / (original**alpha).sum()
        assert weights.temper(alpha).array == pytest.approx(expected, rel=1e-5)
    mixed = weights.temper(uniform_mix=0.25).array
    assert mixed == pytest.approx(0.75 * original + 0.25 / len(original), rel=1e-5)
    clipped = np.clip(original * len(original), 0.5, 1.5)
    assert weights.temper(clip=(0.5, 1.5)).array == pytest.approx(clipped / clipped.sum(), rel=1e-5)
    flat = weights.temper(0.5).temper(uniform_mix=0.1)
    assert weights.ess() < flat.ess() <= NUM_ROWS
    assert flat.steps == ("temper(alpha=0.5, uniform_mix=0.0, clip=None)", "temper(alpha=1.0, uniform_mix=0.1, clip=None)")
    assert len({weights.fingerprint, flat.fingerprint, weights.temper(0.5).fingerprint}) == 3
    for wrong in ({"alpha": -1}, {"uniform_mix": 1.5}, {"clip": (2.0, 1.0)}):
        with pytest.raises(ConfigError):
            weights.temper(**wrong)  # type: ignore[arg-type]


def test_a_row_without_weight_stays_without(store: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.array([0.5, 0.0, 0.25, 0.25], dtype=np.float32))
    with pytest.warns(UserWarning, match="bare"):
        weights = load_weights(tmp_path / "w.npy")
    assert weights.temper(0.0, uniform_mix=0.5).array == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_derived_weights_survive_pickling_and_cannot_be_written(finished_store: Path) -> None:
    weights = load_weights(finished_store)
    for derived in (weights.temper(0.5), weights.for_dataset(small_lines()[:9])):
        again = pickle.loads(pickle.dumps(derived))
        assert np.array_equal(again.array, derived.array)
        assert (again.steps, again.fingerprint, again.store) == (derived.steps, derived.fingerprint, derived.store)
        with pytest.raises(ValueError, match="read-only"):
            derived.array[0] = 1


def test_shape_checks_read_no_weight(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The price of ``verify="shape"`` cannot depend on N: the map is made, not touched, and no digest taken."""
    read: list[str] = []
    monkeypatch.setattr("embstore.training.weights.check_array", lambda root, name, array, digest: read.append(name))
    monkeypatch.setattr("embstore.training.weights.check_vector", lambda name, array: read.append(name) or 1.0)
    monkeypatch.setattr("embstore.training.weights.sha256_of", lambda array: read.append("hash") or "0")
    assert load_weights(store, verify="shape").fingerprint
    np.save(store / "bare.npy", np.zeros(5, dtype=np.float32))
    with pytest.warns(UserWarning, match="bare"):
        load_weights(store / "bare.npy", verify="shape")
    assert read == []
    load_weights(store)
    assert len(read) == 2
    with pytest.raises(InvalidWeightsError):
        load_weights_of_another_type(store)
    with pytest.raises(ConfigError, match="verify"):
        load_weights(store, verify="fast")  # type: ignore[arg-type]


def load_weights_of_another_type(store: Path) -> None:
    np.save(store / "bare.npy", np.zeros(5))
    with pytest.warns(UserWarning, match="bare"):
        load_weights(store / "bare.npy", verify="shape")
