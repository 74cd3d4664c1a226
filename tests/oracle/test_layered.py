"""Layers pass, batches wait: the rows of the layered order are those of the plain one, to the bit."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from embstore.core.interfaces import Check
from embstore.core.prompts import Prompt
from embstore.model.embed import LogitEmbedder
from embstore.model.layer_weights import Weights
from embstore.model.units import Unit
from tests.support.limits import TimeLimit
from tests.support.models import (
    CONFIGS,
    PROMPTS,
    least_model_memory,
    make_model,
    make_tokenizer,
    open_embedder,
    reopened,
    save_model,
)

FolderOf = Callable[[str], Path]
WINDOWS = [PROMPTS[:9], PROMPTS[9:18], PROMPTS[18:]]
SEVERAL, ONE = 1 << 30, 0  # memory for laps: of several windows, or of one


def rows_of(
    embedder: LogitEmbedder,
    windows: Sequence[list[Prompt]] = WINDOWS,
    limit: TimeLimit | None = None,
    check: Check | None = None,
) -> bytes:
    """All that is stored of these windows, asked for as a build does it: those that follow are an iterator."""
    check = check or (limit or TimeLimit()).check
    found = []
    for index, window in enumerate(windows):
        following = iter(windows[index + 1 :])
        for block in embedder.embed(window, first_row=0, chunk_rows=4, check=check, following=following):
            found += [block.emb_BV.tobytes(), block.coord_BR.tobytes(), block.residual_B.tobytes()]
            assert not block.failed
            block.release()
    return b"".join(found)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each unit was made."""
    counted: Counter[str] = Counter()
    genuine = Weights.make

    def make(self: Weights, unit: Unit) -> Callable[[], None]:
        counted[unit.name] += 1
        return genuine(self, unit)

    monkeypatch.setattr(Weights, "make", make)
    return counted


def units_of(embedder: LogitEmbedder) -> tuple[Unit, ...]:
    return embedder.model.weights.parts.units


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of four layers of one of the classes; Gemma 3n has ten units as it is."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def folder(name: str) -> Path:
        return save_model(root / name, make_model(name, layers=None if name == "gemma3n" else 4), make_tokenizer())

    return folder


# one class of each way in which layers differ; tests/matrix has more, and test-slow has all
USUAL = {"llama", "llama-tied", "gpt2", "gemma2", "gemma3n", "mixtral", "deepseek-v3", "mamba", "falcon-h1", "nanochat"}


def usual(name: str, *values: str) -> Any:
    """Parameters that ``make test`` tries only with the usual classes."""
    return pytest.param(name, *values, marks=() if name in USUAL else pytest.mark.slow)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [usual(name) for name in CONFIGS])
def test_rows_are_those_of_the_plain_order(folder_of: FolderOf, name: str, dtype: str, tmp_path: Path) -> None:
    plain = open_embedder(folder_of(name), PROMPTS, tmp_path, dtype=dtype, batch_tokens=64)
    assert plain.model.residency is None
    memory = least_model_memory(plain)
    for threads in (1, 2):
        if threads == 2:
            plain = reopened(folder_of(name), plain, threads=2)
        expected = rows_of(plain)
        for lap_memory in (SEVERAL, ONE):
            layered = reopened(folder_of(name), plain, model_memory=memory, memory_bytes=lap_memory)
            assert layered.model.residency is not None
            assert rows_of(layered) == expected
            layered.close()


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gemma3n", "deepseek-v3", "falcon-h1"))],
)
def test_a_new_store_is_the_same_in_either_order(folder_of: FolderOf, name: str, stored: str, tmp_path: Path) -> None:
    """Probes, basis and settings too, from a checkpoint of any dtype."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=getattr(torch, stored))
    folder = save_model(tmp_path / "model", model, make_tokenizer())
    for dtype in ("float32", "bfloat16"):
        plain = open_embedder(folder, PROMPTS, tmp_path / "work", dtype=dtype, batch_tokens=64)
        memory = least_model_memory(plain)
        layered = open_embedder(folder, PROMPTS, tmp_path / "work", dtype=dtype, batch_tokens=64, model_memory=memory)
        assert layered.model.residency is not None
        assert layered.spec == plain.spec
        assert layered.basis_VR.tobytes() == plain.basis_VR.tobytes()
        assert rows_of(layered) == rows_of(plain)
        layered.close()


@pytest.mark.parametrize("offset", [8, pytest.param(24, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_where_tensors_lie_in_the_file_moves_no_bit(folder_of: FolderOf, stored: str, offset: int, tmp_path: Path) -> None:
    """Kernels are told by alignment, and a file's data lies at any multiple of 8 bytes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of("llama"), dtype=getattr(torch, stored))
    rows = set()
    for start in (0, offset):
        folder = save_model(tmp_path / str(start), model, make_tokenizer())
        move_data(folder / "model.safetensors", start)
        plain = open_embedder(folder, PROMPTS, tmp_path / "work", batch_tokens=64)
        layered = reopened(folder, plain, model_memory=least_model_memory(plain), memory_bytes=SEVERAL)
        rows |= {rows_of(plain), rows_of(layered)}
        layered.close()
    assert len(rows) == 1


def move_data(file: Path, offset: int) -> None:
    """Make the data of a safetensors file begin ``offset`` bytes behind a multiple of 64."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * ((offset - 8 - len(header)) % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert (8 + len(header)) % 64 == offset


@pytest.mark.parametrize("lap_memory", [SEVERAL, ONE])
def test_weights_are_read_once_a_lap_and_tokens_once(
    folder_of: FolderOf, lap_memory: int, made: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = open_embedder(folder_of("llama"), PROMPTS, tmp_path, batch_tokens=64)
    layered = reopened(folder_of("llama"), plain, model_memory=least_model_memory(plain), memory_bytes=lap_memory)
    encoded: list[object] = []
    genuine = layered._tokenizer.encode

    def encode(prompts: Sequence[Prompt]) -> object:
        encoded.append(prompts)
        return genuine(prompts)

    monkeypatch.setattr(layered._tokenizer, "encode", encode)
    made.clear()
    rows_of(layered)
    laps = 1 if lap_memory == SEVERAL else len(WINDOWS)
    # a unit that is open at the end of a lap may serve the next one
    assert all(1 <= made[unit.name] <= laps for unit in units_of(layered))
    assert sum(made.values()) >= (laps - 1) * (len(units_of(layered)) - 2)
    assert len(encoded) == len(WINDOWS)  # also a window that was looked at and found no room
    layered.close()
