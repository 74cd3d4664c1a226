"""A build that an earlier release began: its ``spec.json`` has sentences instead of fields, and is never rewritten.

``data/unfinished`` is a store of 70 rows that b2eabab (2026-11-28) left after its first window, ``unfinished.manifest.json``
the manifest that b2eabab itself wrote at the end of an uninterrupted build. Made with ``build_part`` and ``build_small`` of
``tests.support.stores`` at that commit, without ``.lock`` and ``runs.jsonl``. Do not regenerate them to make a test pass.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import embstore
from embstore.core.errors import IdentityMismatchError
from embstore.core.format import document
from embstore.core.spec import Head, decode_spec
from tests.support.fake import FakeSource
from tests.support.stores import build_small, with_embedding, write_small_prompts

DATA = Path(__file__).parent / "data"
MANIFEST = DATA / "unfinished.manifest.json"
OLD_SPEC = json.loads((DATA / "unfinished" / "spec.json").read_text())


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "unfinished", tmp_path / "store"))


def test_a_resume_ends_with_the_bytes_of_an_uninterrupted_build(unfinished: Path, tmp_path: Path) -> None:
    source = FakeSource()
    build_small(write_small_prompts(tmp_path / "prompts.jsonl"), unfinished, source=source)
    assert source.calls == [(32, 64), (64, 70)]
    found, expected = (json.loads(path.read_bytes())["files"] for path in (unfinished / "manifest.json", MANIFEST))
    # the neighbours' record tells of a re-ranking now (decision 0042); metadata has it, and names the weights' files
    kept = {name: digest for name, digest in expected.items() if not name.startswith(("weights/", "neighbors/"))}
    assert {name: found.get(name) for name in kept} == kept
    arrays = {name: digest for name, digest in expected.items() if name.startswith("neighbors/") and name.endswith(".npy")}
    assert len(arrays) == 3
    assert {name: found.get(name) for name in arrays} == arrays
    old, new = (
        [files[name] for name in files if name.startswith("weights/") and name.endswith(".npy")]
        for files in (expected, found)
    )
    assert new == old != []
    assert embstore.verify(unfinished).findings == []


@pytest.mark.parametrize(
    ("option", "stored", "given"),
    [({"space": "hidden"}, "logits", "hidden"), ({"pooling": "last"}, "mean", "last"), ({"threads": 2}, "1", "2")],
)
def test_another_option_is_refused_by_the_name_it_has_now(
    option: dict[str, object], stored: str, given: str, unfinished: Path
) -> None:
    before = (unfinished / "journal.jsonl").read_bytes()
    with pytest.raises(IdentityMismatchError) as caught:
        build_small(None, unfinished, config=with_embedding(**option))
    (name,) = option
    assert [str(item) for item in caught.value.mismatches] == [f"{name}: the store has {stored}, given {given}"]
    assert (unfinished / "journal.jsonl").read_bytes() == before


def test_another_processor_is_refused_by_the_name_it_has_now(unfinished: Path) -> None:
    source = FakeSource()
    source.hardware = lambda config: {**FakeSource.hardware(source, config), "capability": "OTHER"}  # type: ignore[method-assign]
    with pytest.raises(IdentityMismatchError) as caught:
        build_small(None, unfinished, source=source)
    assert [str(item) for item in caught.value.mismatches] == ["capability: the store has FAKE, given OTHER"]


def test_the_file_keeps_its_bytes_and_reads_as_fields(unfinished: Path) -> None:
    spec = embstore.open_store(unfinished, partial=True).spec.embedding
    assert (spec.head, spec.space, spec.pooling) == (Head(kind="affine", scale=1.0), "logits", "mean")
    assert (spec.capability, spec.packed_layers, spec.packed_head) == ("FAKE", False, False)


@pytest.mark.parametrize(
    ("written", "fields"),
    [
        ("AVX2", ("AVX2", False, False)),
        ("AVX512 with packed layers", ("AVX512", True, False)),
        ("AVX512 with packed layers and head", ("AVX512", True, True)),
        ("NVIDIA H100 sm_90", ("NVIDIA H100 sm_90", False, False)),
    ],
)
def test_what_was_packed_was_written_behind_the_instructions(written: str, fields: tuple[str, bool, bool]) -> None:
    embedding = decode_spec(document({**OLD_SPEC, "embedding": {**OLD_SPEC["embedding"], "capability": written}})).embedding
    assert (embedding.capability, embedding.packed_layers, embedding.packed_head) == fields


@pytest.mark.parametrize(
    ("written", "fields"),
    [
        ("logits of the last own token", ("logits", "last")),
        ("mean of hidden states over own tokens", ("hidden", "mean")),
        ("hidden state of the last own token", ("hidden", "last")),
        ("none: rows are given", ("none", "none")),
    ],
)
def test_space_and_pooling_were_one_sentence(written: str, fields: tuple[str, str]) -> None:
    embedding = decode_spec(document({**OLD_SPEC, "embedding": {**OLD_SPEC["embedding"], "pooling": written}})).embedding
    assert (embedding.space, embedding.pooling) == fields
