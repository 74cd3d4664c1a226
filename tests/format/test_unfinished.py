"""A build that an earlier release began: its ``spec.json`` has sentences instead of fields, and is never rewritten.

``data/unfinished`` is a store of 70 rows that b2eabab (2026-11-28) left after its first window, ``unfinished.manifest.json``
the manifest that b2eabab itself wrote at the end of an uninterrupted build. Made with ``build_part`` and ``build_small`` of
``tests.support.stores`` at that commit, without ``.lock`` and ``runs.jsonl``. Do not regenerate them to make a test pass.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import embstore
from embstore.core.config import CURRENT_RULE, FIRST_RULE
from embstore.core.errors import IdentityMismatchError
from embstore.core.format import document
from embstore.core.spec import Head, decode_spec
from embstore.training import load_weights, prompt_keys
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource
from tests.support.stores import build_part, build_small, small_lines, with_embedding, write_lines, write_small_prompts

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
    assert not (unfinished / "sequences.npy").exists(), "the store began without it"
    assert embstore.open_store(unfinished).sequences is None
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


# --- the rule of prompts ---------------------------------------------------------------------------------------------------


def test_a_store_from_before_rules_has_the_first_and_keeps_it(unfinished: Path, tmp_path: Path) -> None:
    """The prompts file is read again by the rule that the store began with; what it publishes records no other."""
    lines = [*small_lines(), b'{"prompt": "Explain number 3.", "score": NaN}\n', {"prompt": "Explain number 3.", "id": True}]
    assert embstore.open_store(unfinished, partial=True).journal.prompts.rule == FIRST_RULE  # type: ignore[union-attr]
    build_small(write_lines(tmp_path / "p.jsonl", lines), unfinished)  # the last two lines are quarantined by rule 1
    store = embstore.open_store(unfinished)
    assert store.manifest is not None
    assert store.manifest.rule == FIRST_RULE
    assert b'"rule"' not in (unfinished / "manifest.json").read_bytes()
    assert embstore.verify(unfinished).findings == []


def test_what_only_the_new_rule_reads_is_another_input_to_an_old_store(unfinished: Path, tmp_path: Path) -> None:
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a part"}]}]}
    prompts = write_lines(tmp_path / "p.jsonl", [*small_lines(), parts])
    build_small(prompts, unfinished)  # quarantined, as b2eabab would have done it
    with pytest.raises(IdentityMismatchError, match="rows: the store has 70, given 71"):
        build_small(prompts, build_part(write_lines(tmp_path / "q.jsonl", small_lines()), tmp_path / "new", rows=32))


def test_turns_of_an_old_store_are_all(unfinished: Path) -> None:
    with pytest.raises(IdentityMismatchError, match="turns: the store has all, given prompt"):
        build_small(None, unfinished, config=dataclasses.replace(CONFIG, turns="prompt"))


def test_plain_prompts_join_with_an_old_store_as_before(tmp_path: Path) -> None:
    """Texts and chats of nothing but role and content: every row of the golden store is found, in order."""
    store = Path(shutil.copytree(DATA / "v1", tmp_path / "v1", symlinks=True))
    keys = prompt_keys(small_lines())
    np.testing.assert_array_equal(keys, np.load(store / "keys.npy"))
    assert len(load_weights(store).for_dataset(small_lines())) == 70


def test_rows_of_an_old_store_are_reused_by_a_new_one(tmp_path: Path) -> None:
    store = Path(shutil.copytree(DATA / "v1", tmp_path / "v1", symlinks=True))
    prompts = write_lines(tmp_path / "p.jsonl", [*small_lines(), {"prompt": "a new one"}])
    source = FakeSource()
    source.versions = None
    report = build_small(prompts, tmp_path / "new", config=dataclasses.replace(CONFIG, reuse=(str(store),)), source=source)
    assert (report.reused_rows, report.embedded_rows) == (70, 1)
    new = embstore.open_store(tmp_path / "new")
    assert new.manifest is not None
    assert new.manifest.rule == CURRENT_RULE
