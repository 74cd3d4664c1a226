"""Every causal class of the installed transformers, tiny and random: rows against the class's own logits, prompt by prompt.

``classes.toml`` records what each does. A class that begins to fail, or to work, fails its test; under another version of
transformers than the recorded one, classes that came, went or cannot be made any longer are skipped with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embstore.core.config import EmbeddingConfig
from embstore.model.backbone import SplitModel
from embstore.model.locate import locate_model
from tests.matrix.comparing import PROMISED_L2, Found, ask_class, compare, load_class, one_thread, open_tiny
from tests.matrix.page import PAGE, page
from tests.matrix.record import Expected, read_record
from tests.matrix.state import changed_state
from tests.matrix.tiny import MODEL_TYPES, before_cap, save_tiny, soft_cap, tiny_config
from tests.support.models import PROMPTS, distances, reopened, rows_before_rounding

RECORD = read_record()
# One of each kind, for every run; all of them run with the marker ``slow``.
SAMPLE = (
    "llama",  # dense
    "mixtral",  # experts
    "deepseek_v3",  # latent attention, and a buffer that is trained
    "zamba2",  # blocks that several layers share
    "gemma3n_text",  # keys of another layer, inputs of every layer
    "gemma4_text",  # the same, with layers of two widths
    "gemma2",  # capped
    "granite",  # scaled
    "cohere",
    "mamba2",  # state spaces
    "falcon_h1",
    "recurrent_gemma",
    "bloom",  # ALiBi
    "gpt2",  # learned positions
    "opt",
    "bert",  # looks ahead
    "modernbert-decoder",  # a network before the output layer
)
# Heads with a cap that run in the class's own code: their configurations name several.
STREAMED_CAPS = ("inkling2_loop_text", "inkling2_text", "xlstm")
CAPPED = [name for name, each in RECORD.expected.items() if each.head == "capped"] + list(STREAMED_CAPS)
IS_RECORDED_VERSION = transformers.__version__ == RECORD.transformers
ANOTHER_VERSION = f"recorded with transformers {RECORD.transformers}, this is {transformers.__version__}"


def types(names: Any = MODEL_TYPES) -> list[Any]:
    return [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in names]


def expected_of(model_type: str) -> Expected:
    if model_type in RECORD.expected:
        return RECORD.expected[model_type]
    if IS_RECORDED_VERSION:
        pytest.fail(f"{model_type} is not recorded in classes.toml")
    pytest.skip(f"{model_type} is new: {ANOTHER_VERSION}")


def skip_unless_right(model_type: str) -> None:
    if (expected := expected_of(model_type)).how != "right":
        pytest.skip(f"{expected.how}: {expected.reason}")


@contextlib.contextmanager
def as_recorded() -> Iterator[None]:
    """An error under another version of transformers skips: there the class may differ, or not be there."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        if IS_RECORDED_VERSION:
            raise
        pytest.skip(f"{ANOTHER_VERSION}: {type(error).__name__}: {str(error)[:200]}")


def check(found: Found, expected: Expected) -> None:
    told = f"worst row {found.worst:.1e}; {found.raises}: {found.message[:300]}"
    if not IS_RECORDED_VERSION and found.how not in ("wrong", expected.how):
        pytest.skip(f"{expected.how} when recorded, {found.how} now ({told}): {ANOTHER_VERSION}")
    assert (found.how, found.head) == (expected.how, expected.head), told
    if IS_RECORDED_VERSION:
        assert found.raises == expected.raises, told
        assert expected.message in found.message


def test_every_class_is_recorded() -> None:
    if not IS_RECORDED_VERSION:
        pytest.skip(ANOTHER_VERSION)
    assert sorted(RECORD.expected) == sorted(MODEL_TYPES)
    assert {*RECORD.keeps_state, *RECORD.plain_only, *RECORD.float32_only} < set(RECORD.expected)
    assert all(each.reason for each in RECORD.expected.values() if each.how != "right")


def test_the_sample_is_right() -> None:
    assert {RECORD.expected[name].how for name in SAMPLE} == {"right"}


@pytest.mark.parametrize("model_type", types())
def test_rows_are_the_class_s_own(model_type: str, tmp_path: Path) -> None:
    expected = expected_of(model_type)
    found = compare(model_type, tmp_path)
    check(found, expected)
    assert found.std == 0 or found.std > 1.5  # small logits would hide a wrong head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", types())
def test_both_orders_give_the_same_bits(
    model_type: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layered order in the least memory that it takes: two layers at a time."""
    skip_unless_right(model_type)
    if dtype == "bfloat16" and model_type in RECORD.float32_only:
        pytest.skip(RECORD.float32_only[model_type])
    with one_thread(), as_recorded():
        folder = save_tiny(tmp_path / "model", model_type)
        plain = open_tiny(folder, tmp_path, dtype)
        assert plain.model.residency is None
        monkeypatch.setattr("embstore.model.settings.SMALL_BACKBONE_BYTES", 0)
        layered = open_tiny(folder, tmp_path, dtype)
        assert (layered.model.residency is None) == (model_type in RECORD.plain_only), layered.model.why_plain
        assert np.array_equal(rows_before_rounding(layered, PROMPTS), rows_before_rounding(plain, PROMPTS))


@pytest.mark.parametrize("model_type", types(CAPPED))
def test_a_cap_that_is_left_out_is_noticed(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_right(model_type)
    with one_thread(), as_recorded():
        folder = save_tiny(tmp_path / "model", model_type)
        model = load_class(folder)
        cap, oracle = soft_cap(model.config), ask_class(model)
        assert cap is not None
        assert before_cap(oracle.largest, cap) >= 0.5
        if model_type in STREAMED_CAPS:
            return  # the class's own code caps: embstore cannot leave it out
        embedder = open_tiny(folder, tmp_path)
        monkeypatch.setattr(SplitModel, "soft_caps", lambda self: {1e6 * cap})
        without_cap_NV = rows_before_rounding(reopened(folder, embedder), PROMPTS)
        assert distances(without_cap_NV, oracle.rows_NV).min() > 100 * PROMISED_L2


@pytest.mark.parametrize("model_type", types())
def test_what_has_a_cap_is_known_to_have_one(model_type: str) -> None:
    if expected_of(model_type).how == "impossible":
        return
    with as_recorded():
        assert (soft_cap(tiny_config(model_type)) is not None) == (model_type in CAPPED)


@pytest.mark.parametrize("model_type", types())
def test_every_tensor_is_that_of_from_pretrained(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file holds, and whatever is computed with: parameters, buffers of the file and buffers that are made."""
    skip_unless_right(model_type)
    monkeypatch.setattr(
        "embstore.model.layer_weights._SMALL_TABLE_BYTES", 0
    )  # embedding tables stay mapped, as large ones do
    with as_recorded():
        check_tensors(save_tiny(tmp_path / "model", model_type))


def check_tensors(folder: Path) -> None:
    for stored, computed in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        if stored != torch.float32:
            config = transformers.AutoConfig.from_pretrained(folder)
            load_class(folder, stored).save_pretrained(folder)
            config.save_pretrained(folder)
        expected = load_class(folder, computed)
        found, backbone = computed_tensors(folder, computed)
        wanted = dict(expected.named_parameters()) | dict(expected.named_buffers())
        assert wanted.keys() <= found.keys()
        for name, tensor in wanted.items():
            # what follows the backbone stays as it is stored, and is cast a block at a time
            given = found[name] if name in backbone else found[name].to(tensor.dtype)
            assert given.dtype == tensor.dtype, (name, stored, computed)
            assert torch.equal(given.nan_to_num(), tensor.nan_to_num()), (name, stored, computed)


def computed_tensors(folder: Path, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors that a pass in ``dtype`` computes with, and the names of those in the backbone."""
    loaded = locate_model(EmbeddingConfig(model=str(folder))).load("logits")
    model = SplitModel(loaded.model, torch.device("cpu"))
    model.settle(dtype, None)
    inside = set(model.backbone.modules())
    found, backbone = {}, set()
    for path, module in model.module.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                is_table = isinstance(module, torch.nn.Embedding) and name == "weight"
                found[f"{path}.{name}".lstrip(".")] = looked_up(tensor) if is_table else tensor
                if module in inside:
                    backbone.add(f"{path}.{name}".lstrip("."))
    return found, backbone


def looked_up(table: torch.Tensor) -> torch.Tensor:
    """Every row, as a batch's tokens get it."""
    return torch.nn.functional.embedding(torch.arange(len(table)), table)


@pytest.mark.parametrize("model_type", types())
def test_what_keeps_state_in_its_modules_is_known(model_type: str) -> None:
    """Two batches at a time would meet there."""
    if expected_of(model_type).how == "impossible":
        return
    with as_recorded():
        assert bool(found := changed_state(model_type)) == (model_type in RECORD.keeps_state), found


def test_the_page_is_made_of_the_record() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.matrix.page"
