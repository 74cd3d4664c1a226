"""The index of keys: the same as a dict, in memory and in a file, and nothing is left of the file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embstore.core.errors import StorageError
from embstore.core.events import Event, Notice
from embstore.storage import key_index
from embstore.storage.key_index import KeyIndex, keys_of, text_keys

LARGE, NONE = 1 << 30, 0

names = st.integers(0, 200).map(str)
batches = st.lists(st.lists(names, max_size=40, unique=True), max_size=12)


@pytest.mark.parametrize("memory_bytes", [LARGE, NONE])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(batches=batches, changed=st.lists(names, unique=True), slots=st.sampled_from([2, 4, 64]))
def test_it_is_a_dict(
    memory_bytes: int, batches: list[list[str]], changed: list[str], slots: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("index")
    known: dict[str, tuple[int, int]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_index, "_FIRST_SLOTS", slots)
        patch.setattr(key_index, "_COPIED_SLOTS", 3)
        index = KeyIndex(folder, memory_bytes=memory_bytes, name="the index", width=2)
        for batch in batches:
            found = index.find(text_keys(batch)).tolist()
            assert found == [list(known.get(name, (-1, -1))) for name in batch]
            added = {name: (len(known) + at, 7 * at) for at, name in enumerate(batch) if name not in known}
            known |= added
            if added:
                index.add(text_keys(list(added)), np.array(list(added.values())))
        held = [name for name in changed if name in known]
        known |= dict.fromkeys(held, (5, 6))
        index.change(text_keys(held), np.array([(5, 6)] * len(held)).reshape(-1, 2))
        everything = [str(number) for number in range(201)]
        assert index.find(text_keys(everything)).tolist() == [list(known.get(name, (-1, -1))) for name in everything]
        assert len(index) == len(known)
        index.fill(9)
        assert index.find(text_keys(everything)).tolist() == [[9, 9] if name in known else [-1, -1] for name in everything]
    assert list(folder.iterdir()) == []


def test_keys_that_share_their_slot_are_told_apart(tmp_path: Path) -> None:
    """Keys with one first half, which alone decides the slot."""
    digests = [b"12345678" + hashlib.sha256(b"%d" % number).digest()[:8] for number in range(500)]
    index = KeyIndex(tmp_path, memory_bytes=LARGE, name="the index")
    index.add(keys_of(digests[:300]), np.arange(300)[:, None])
    index.add(keys_of(digests[300:]), np.arange(300, 500)[:, None])
    assert index.find(keys_of(digests))[:, 0].tolist() == list(range(500))
    assert index.find(keys_of([b"12345678" + bytes(8)]))[:, 0].tolist() == [-1]


def test_a_table_that_outgrows_its_memory_says_where_it_goes(tmp_path: Path) -> None:
    events: list[Event] = []
    index = KeyIndex(tmp_path, memory_bytes=1 << 18, name="the index of ids", observer=events.append)
    for start in range(0, 40_000, 1000):
        texts = [str(number) for number in range(start, start + 1000)]
        index.add(text_keys(texts), np.arange(start, start + 1000)[:, None])
        assert list(tmp_path.iterdir()) == [], "whatever becomes of the process, no file is left"
    assert index.find(text_keys(["0", "39999", "40000"]))[:, 0].tolist() == [0, 39_999, -1]
    (notice,) = events
    assert isinstance(notice, Notice)
    assert notice.message == (
        "the index of ids does not fit its share of --memory-budget: it goes on in a file of 384.0 KiB in "
        f"{tmp_path}, which doubles as it fills and is gone afterwards"
    )


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left on device") as caught:
        KeyIndex(tmp_path, memory_bytes=NONE, name="the index")
    assert "free some space" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
