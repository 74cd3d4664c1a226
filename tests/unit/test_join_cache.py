"""Rows of a join are kept: a second start reads no prompt. Whatever is wrong with the cache, the rows are right."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from embstore.core.errors import KeyMismatchError
from embstore.training import join_cache, load_weights, reading
from tests.support.stores import build_small, small_lines, write_lines

LINES = small_lines()
DATASET = datasets.Dataset.from_list([{"prompt": None, "messages": None, "id": None, "src": None} | line for line in LINES])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the files of the cache."""
    monkeypatch.setenv("EMBSTORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "joins"


class Reads:
    """Counts the blocks whose prompts are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks = 0
        original = reading.PromptReading.read

        def read(own: reading.PromptReading, block: Any) -> reading.BlockPrompts:
            self.blocks += 1
            return original(own, block)

        monkeypatch.setattr(reading.PromptReading, "read", read)

    def during(self, action: Any) -> int:
        """Blocks that are read while ``action`` runs."""
        before = self.blocks
        action()
        return self.blocks - before


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def results(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.npy"))


def test_a_second_join_reads_no_prompt(
    finished_store: Path, cache: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_weights(finished_store).for_dataset(DATASET)
    (path,) = results(cache)
    assert np.load(path)[:-5].tolist() == list(range(70))  # int64 rows, then what the join was, then a digest
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    monkeypatch.setattr("embstore.training.weights.read_keys", None)
    again = load_weights(finished_store)
    assert reads.during(lambda: again.for_dataset(DATASET)) == 0
    assert np.array_equal(again.for_dataset(DATASET).array, first.array)
    assert again.for_dataset(DATASET, duplicates="divide").steps == ("align(on_missing='error', duplicates='divide')",)


def test_what_decides_the_rows_decides_the_file(finished_store: Path, cache: Path, reads: Reads, tmp_path: Path) -> None:
    """Other content, selections, columns and stores are joined by themselves, equal fingerprints or not."""
    weights = load_weights(finished_store)
    weights.for_dataset(DATASET)
    texts = [line["prompt"] for line in LINES if "prompt" in line]
    changed = datasets.Dataset.from_dict({"prompt": ["Explain number 7.", *texts[1:]], "other": texts})
    original = datasets.Dataset.from_dict({"prompt": texts, "other": texts})
    changed._fingerprint = original._fingerprint  # as after set_seed, with functions that cannot be hashed
    for dataset in (original, changed, original.shuffle(seed=1), original.shuffle(seed=2), original.select(range(9))):
        order = [weights.for_dataset([text]) and texts.index(text) for text in dataset["prompt"]]
        assert reads.during(lambda: weights.for_dataset(dataset)) >= 1  # noqa: B023 - called here
        share = load_weights(finished_store).array[
            [LINES.index(next(line for line in LINES if line.get("prompt") == texts[row])) for row in order]
        ]
        assert weights.for_dataset(dataset).array == pytest.approx(share / share.sum(), rel=1e-5)
    assert reads.during(lambda: weights.for_dataset(original, key_column="other")) == 1
    reverse = tmp_path / "reverse"
    build_small(write_lines(tmp_path / "reverse.jsonl", LINES[::-1]), reverse)
    assert reads.during(lambda: load_weights(reverse).for_dataset(DATASET)) == 1
    by_reverse = load_weights(reverse)
    assert by_reverse.for_dataset(DATASET).array == pytest.approx(by_reverse.array[::-1], rel=1e-5)


def test_another_weighting_of_the_store_uses_the_same_rows(store: Path, cache: Path, reads: Reads) -> None:
    from embstore.core.config import WeightingConfig
    from embstore.flow.artifact import recompute_weights

    load_weights(store).for_dataset(DATASET)
    recompute_weights(store, WeightingConfig(gamma=3))
    assert reads.during(lambda: load_weights(store).for_dataset(DATASET)) == 0
    assert np.allclose(load_weights(store).for_dataset(DATASET).array, load_weights(store).array, rtol=1e-6)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text", "swapped", "folder", "other rows"])
def test_a_damaged_file_is_found_out_and_made_again(finished_store: Path, cache: Path, reads: Reads, damage: str) -> None:
    weights = load_weights(finished_store)
    expected = weights.for_dataset(DATASET).array
    (path,) = results(cache)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[150] ^= 1
        path.write_bytes(content)
    elif damage in ("cut", "empty"):
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    elif damage == "text":
        path.write_text("what is this?")
    elif damage == "swapped":  # whole, but of another dataset
        weights.for_dataset(DATASET.select(range(69, -1, -1)))
        other = next(each for each in results(cache) if each != path)
        shutil.copyfile(other, path)
    elif damage == "other rows":  # whole, but rows that this store does not have
        values = np.load(path)[:-4]
        values[3] = 70
        join_cache._write(path, values)
    else:
        path.unlink()
        path.mkdir()
    assert reads.during(lambda: weights.for_dataset(DATASET)) == 1
    assert np.array_equal(weights.for_dataset(DATASET).array, expected)
    if damage not in ("folder", "other rows"):
        assert reads.during(lambda: weights.for_dataset(DATASET)) == 0


def test_an_incomplete_join_is_kept_and_explained_all_the_same(finished_store: Path, cache: Path, reads: Reads) -> None:
    weights = load_weights(finished_store)
    dataset = datasets.Dataset.from_dict({"prompt": ["Explain number 1.", "nobody built this"]})
    assert weights.for_dataset(dataset, on_missing="drop").array.tolist() == [1, 0]
    assert reads.during(lambda: weights.for_dataset(dataset, on_missing="drop")) == 0
    for _ in range(2):
        with pytest.raises(KeyMismatchError, match="item 1, 'nobody built this'"):
            weights.for_dataset(dataset)


@pytest.mark.parametrize(
    ("prompts", "first"),
    [(["nobody built this", "nor this"], 0), (["Explain number 1.", "nobody built this"], 1), ([" ", "nor this"], 1)],
)
def test_a_kept_join_says_of_missing_items_what_the_first_one_said(
    prompts: list[str], first: int, finished_store: Path, cache: Path
) -> None:
    """Whatever is wanted of missing items: a policy does not take a dataset of which nothing was found."""
    weights = load_weights(finished_store)
    dataset = datasets.Dataset.from_dict({"prompt": prompts})
    said: dict[str, list[str]] = {"error": [], "drop": []}
    for _ in range(2):
        for policy, messages in said.items():
            try:
                weights.for_dataset(dataset, on_missing=policy)  # type: ignore[arg-type]
            except KeyMismatchError as error:
                messages.append(str(error))
    assert len(results(cache)) == 1
    for policy, messages in said.items():
        assert len(messages) == (0 if policy == "drop" and prompts[0].startswith("Explain") else 2)
        assert len(set(messages)) <= 1
        assert all(f"the first is item {first}, {prompts[first]!r}" in message for message in messages)


def test_without_a_place_to_keep_rows_they_are_computed(
    finished_store: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_weights(finished_store)
    (tmp_path / "file").write_text("")
    homes = {
        "nothing is to be kept": {"EMBSTORE_CACHE": ""},
        "not a folder": {"EMBSTORE_CACHE": str(tmp_path / "file")},
        "read-only": {"XDG_CACHE_HOME": "/proc/self"},
    }
    for environment in homes.values():
        monkeypatch.delenv("EMBSTORE_CACHE")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for _ in range(2):
            assert reads.during(lambda: weights.for_dataset(DATASET)) == 1
        monkeypatch.setenv("EMBSTORE_CACHE", "x")
    monkeypatch.setenv("EMBSTORE_CACHE", str(tmp_path / "full"))
    with monkeypatch.context() as full:
        full.setattr(np, "save", lambda file, array: file.write(b"half") and _raise(OSError(28, "No space left on device")))
        assert reads.during(lambda: weights.for_dataset(DATASET)) == 1
        assert [path.suffix for path in (tmp_path / "full" / "joins").iterdir()] == [".lock"]
    assert reads.during(lambda: weights.for_dataset(DATASET)) == 1


def _raise(error: OSError) -> None:
    raise error


def test_the_folder_is_in_the_users_cache_and_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EMBSTORE_CACHE", str(tmp_path / "named"))
    assert join_cache._folder() == tmp_path / "named" / "joins"
    monkeypatch.delenv("EMBSTORE_CACHE")
    assert join_cache._folder() == tmp_path / "xdg" / "embstore" / "joins"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert join_cache._folder() == tmp_path / "home" / ".cache" / "embstore" / "joins"


def test_the_files_that_were_not_used_for_longest_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_cache, "_MOST_BYTES", 3500)
    for number in range(4):  # 1,032 bytes of values and a header each
        name = f"{number:064x}"
        join_cache.kept(name, lambda: np.arange(100, dtype=np.int64))
        os.utime(cache / f"{name}.npy", (number, number))
    left = cache / ".x.tmp"
    left.write_bytes(b"of a process that was killed")
    os.utime(left, (1, 1))
    assert join_cache.kept(f"{1:064x}", _never).tolist() == list(range(100))  # used again
    join_cache.kept(f"{9:064x}", lambda: np.arange(100, dtype=np.int64))
    assert {path.stem.lstrip("0") for path in results(cache)} == {"3", "1", "9"}
    assert not left.exists()


def _never() -> Any:
    raise AssertionError("it is kept")


def _join_in_a_process(store: str, cache: str, counted: str, barrier: Any) -> None:
    os.environ["EMBSTORE_CACHE"] = cache
    original = join_cache._write

    def slow(path: Path, values: Any) -> None:
        time.sleep(0.3)  # so that the others come while this one works
        with Path(counted).open("a") as file:
            file.write("computed\n")
        original(path, values)

    join_cache._write = slow
    barrier.wait()
    weights = load_weights(store).for_dataset(DATASET)
    with Path(counted).open("a") as file:
        file.write(f"joined {weights.fingerprint}\n")


def test_one_of_many_processes_computes_and_the_others_wait_for_it(
    finished_store: Path, cache: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    arguments = (str(finished_store), str(cache.parent), str(tmp_path / "counted"), barrier)
    ranks = [context.Process(target=_join_in_a_process, args=arguments) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    said = (tmp_path / "counted").read_text().splitlines()
    assert said.count("computed") == 1
    joined = [line for line in said if line.startswith("joined")]
    assert len(joined) == 4
    assert len(set(joined)) == 1


def test_who_waits_too_long_computes_without_the_file(
    finished_store: Path, cache: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    weights = load_weights(finished_store)
    weights.for_dataset(DATASET)
    (path,) = results(cache)
    path.unlink()
    monkeypatch.setattr(join_cache, "_LONGEST_WAIT", 0.0)
    with (cache / f"{path.stem[0]}.lock").open("rb") as held:  # by a process that was stopped
        fcntl.flock(held, fcntl.LOCK_EX)
        assert reads.during(lambda: weights.for_dataset(DATASET)) == 1
    assert results(cache) == []
    weights.for_dataset(DATASET)
    assert results(cache) == [path]


def test_lists_frames_and_transforms_are_not_kept(finished_store: Path, cache: Path) -> None:
    weights = load_weights(finished_store)
    weights.for_dataset(LINES)
    weights.for_dataset(DATASET.to_pandas())
    weights.for_dataset(DATASET.with_transform(lambda batch: batch))
    weights.for_dataset(DATASET.to_iterable_dataset())
    assert not cache.exists()
