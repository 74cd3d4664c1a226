"""Every causal class of the installed transformers, tiny and random: rows against the class's own logits, prompt by prompt.

``classes.toml`` records what each does. A class that begins to fail, or to work, fails its test; under another version of
transformers than the recorded one, classes that came, went or cannot be made any longer are skipped with the reason.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embstore.core.config import EmbeddingConfig
from embstore.core.spec import Head
from embstore.model.dtypes import compute_dtypes, fresh_buffers
from embstore.model.load import locate_model
from tests.matrix.comparing import PROMISED_L2, Found, ask_class, compare, load_class, one_thread, open_tiny
from tests.matrix.page import PAGE, page
from tests.matrix.record import Expected, read_record
from tests.matrix.state import changed_state
from tests.matrix.tiny import MODEL_TYPES, loudest_before_cap, save_tiny, soft_cap, tiny_config
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
_STREAMED_CAPS = ("inkling2_loop_text", "inkling2_text", "xlstm")
CAPPED = [name for name, each in RECORD.expected.items() if each.head == "capped"] + list(_STREAMED_CAPS)
IS_RECORDED_VERSION = transformers.__version__ == RECORD.transformers
ANOTHER_VERSION = f"recorded with transformers {RECORD.transformers}, this is {transformers.__version__}"
HAS_LAYERED_ORDER = "model_memory" in {field.name for field in dataclasses.fields(EmbeddingConfig)}


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


def made(model_type: str, folder: Path) -> Path:
    try:
        return save_tiny(folder, model_type)
    except Exception as error:
        if IS_RECORDED_VERSION:
            raise
        pytest.skip(f"cannot be made: {ANOTHER_VERSION}: {error}")


def check(found: Found, expected: Expected) -> None:
    if not IS_RECORDED_VERSION and (found.how == "impossible") != (expected.how == "impossible"):
        pytest.skip(f"{expected.how} when recorded, {found.how} now ({found.message[:200]}): {ANOTHER_VERSION}")
    told = f"worst row {found.worst:.1e}; {found.raises}: {found.message[:300]}"
    assert (found.how, found.head) == (expected.how, expected.head), told
    if IS_RECORDED_VERSION:
        assert found.raises == expected.raises, told
        assert expected.message in found.message


def orders(model_type: str, order: str) -> dict[str, Any]:
    """Settings that force an order: more memory than the model has bytes, or less than its layers have together."""
    if order == "plain":
        return {"model_memory": 1 << 40} if HAS_LAYERED_ORDER else {}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type))
    return {"model_memory": sum(each.nbytes for each in model.base_model.parameters()) - 1}


def test_every_class_is_recorded() -> None:
    if not IS_RECORDED_VERSION:
        pytest.skip(ANOTHER_VERSION)
    assert sorted(RECORD.expected) == sorted(MODEL_TYPES)
    assert set(RECORD.keeps_state) < set(RECORD.expected)
    assert all(each.reason for each in RECORD.expected.values() if each.how != "right")


def test_the_sample_is_right() -> None:
    assert {RECORD.expected[name].how for name in SAMPLE} == {"right"}


@pytest.mark.parametrize("model_type", types())
def test_rows_are_the_class_s_own(model_type: str, tmp_path: Path) -> None:
    expected = expected_of(model_type)
    found = compare(model_type, tmp_path, **orders(model_type, "plain"))
    check(found, expected)
    assert found.std == 0 or found.std > 1.5  # small logits would hide a wrong head


@pytest.mark.skipif(not HAS_LAYERED_ORDER, reason="there is one order only: EmbeddingConfig has no model_memory")
@pytest.mark.parametrize("model_type", types())
def test_both_orders_give_the_same_bits(model_type: str, tmp_path: Path) -> None:
    skip_unless_right(model_type)
    plain, layered = (
        compare(model_type, tmp_path / order, **orders(model_type, order)) for order in ("plain", "layered")
    )
    check(layered, RECORD.expected[model_type])
    assert np.array_equal(plain.rows_NV, layered.rows_NV)


@pytest.mark.parametrize("model_type", types(CAPPED))
def test_a_cap_that_is_left_out_is_noticed(model_type: str, tmp_path: Path) -> None:
    skip_unless_right(model_type)
    with one_thread():
        folder = made(model_type, tmp_path / "model")
        model = load_class(folder)
        cap, oracle = soft_cap(model.config), ask_class(model)
        assert cap is not None
        assert loudest_before_cap(oracle.largest, cap) >= 0.5
        embedder = open_tiny(folder, tmp_path)
        assert distances(rows_before_rounding(embedder, PROMPTS), oracle.rows_NV).max() <= 10 * PROMISED_L2
        without_cap = reopened(folder, embedder, head=Head(kind="affine"))
        rows_NV = rows_before_rounding(without_cap, PROMPTS)
        rows_NV /= np.linalg.norm(rows_NV, axis=1, keepdims=True)  # the basis does not have all of such a row
        assert distances(rows_NV, oracle.rows_NV).min() > 1000 * PROMISED_L2


@pytest.mark.parametrize("model_type", types())
def test_what_has_a_cap_is_known_to_have_one(model_type: str) -> None:
    if expected_of(model_type).how == "right":
        assert (soft_cap(tiny_config(model_type)) is not None) == (model_type in CAPPED)


@pytest.mark.parametrize("model_type", types())
def test_every_tensor_is_that_of_from_pretrained(model_type: str, tmp_path: Path) -> None:
    """Whatever the file holds, and whatever is computed with: parameters, buffers of the file and buffers that are made."""
    skip_unless_right(model_type)
    folder = made(model_type, tmp_path / "model")
    for stored, computed in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        if stored != torch.float32:
            config = transformers.AutoConfig.from_pretrained(folder)
            load_class(folder, stored).save_pretrained(folder)
            config.save_pretrained(folder)
        expected = load_class(folder, computed)
        expected_tensors = dict(expected.named_parameters()) | dict(expected.named_buffers())
        found_tensors = computed_tensors(folder, computed)
        assert sorted(found_tensors) == sorted(expected_tensors)
        for name, tensor in expected_tensors.items():
            assert found_tensors[name].dtype == tensor.dtype, (name, stored, computed)
            assert torch.equal(found_tensors[name].nan_to_num(), tensor.nan_to_num()), (name, stored, computed)


def computed_tensors(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that a pass in ``dtype`` computes with, each made as it is used: of what lies in the file, cast."""
    model, _ = locate_model(EmbeddingConfig(model=str(folder))).load("logits")
    rules = compute_dtypes(model, dtype)
    stored = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: stored[name].to(rule) for name, rule in rules.items()} | fresh_buffers(model, dtype)


@pytest.mark.parametrize("model_type", types())
def test_what_keeps_state_in_its_modules_is_known(model_type: str) -> None:
    """Two batches at a time would meet there."""
    if expected_of(model_type).how != "impossible":
        assert bool(found := changed_state(model_type)) == (model_type in RECORD.keeps_state), found


def test_the_page_is_made_of_the_record() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.matrix.page"
