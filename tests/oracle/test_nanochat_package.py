"""Checkpoints of later nanochat generations through an installed ``nanochat``: a small one of our own, float64 as oracle."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError
from embstore.integrations.nanochat.package import find_package
from embstore.model.embed import LogitEmbedder
from embstore.model.locate import locate_model
from embstore.model.positions import usable_positions
from embstore.model.source import TorchSource
from tests.support import later_gpt
from tests.support.checkpoints import Evil, State, make_base, tokens_of
from tests.support.models import (
    PROMPTS,
    distances,
    embed,
    open_embedder,
    rows_before_rounding,
    unit_mean,
)

# the vocabulary is no multiple of 64, and a window of 32 tokens is shorter than the longest prompts
CONFIG = {
    "sequence_len": 128,
    "vocab_size": 290,
    "n_layer": 3,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "window_pattern": "SSL",
}
MODEL = Path("nanochat:base")
IDS = [tokens_of(prompt.text or "") for prompt in PROMPTS]
TRUSTED: dict[str, Any] = {"trust_tokenizer_pickle": True}


def make_state(seed: int = 0) -> State:
    """Random weights, loud enough for the soft cap to matter; every scale and gate does something."""
    torch.manual_seed(seed)
    gpt = later_gpt.GPT(later_gpt.GPTConfig(**CONFIG))
    state = {name: torch.randn_like(tensor) for name, tensor in gpt.state_dict().items()}
    scaled = {name: tensor / tensor.shape[1] ** 0.5 for name, tensor in state.items() if tensor.ndim == 2}
    state |= {name: tensor for name, tensor in scaled.items() if "wte" not in name and "value_embeds" not in name}
    return state | {
        "lm_head.weight": 9 * scaled["lm_head.weight"],
        "resid_lambdas": torch.tensor([1.1, 0.8, 0.9]),
        "backout_lambda": torch.tensor([0.3]),
    }


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where checkpoints go; a nanochat is installed, and none is imported before or after."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.syspath_prepend(str(later_gpt.write_package(tmp_path / "site")))
    yield tmp_path / "base"
    for name in [name for name in sys.modules if name.split(".")[0] == "nanochat"]:
        del sys.modules[name]


def oracle(state: State, monkeypatch: pytest.MonkeyPatch) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """Logits [T, V] and what their output layer was given [T, D], float64, of one unpadded prompt at a time."""
    with monkeypatch.context() as patch:
        patch.setattr(later_gpt, "COMPUTE_DTYPE", torch.float64)
        gpt = later_gpt.GPT(later_gpt.GPTConfig(**CONFIG)).double()
        gpt.load_state_dict({name: tensor.double() for name, tensor in state.items()})
        states: list[NDArray[np.float64]] = []
        gpt.lm_head.register_forward_pre_hook(lambda _, given: states.append(given[0][0].numpy()))
        with torch.inference_mode():
            logits = [gpt(torch.tensor([ids]))[0].numpy() for ids in IDS]
        return logits, states


def resumed(like: LogitEmbedder) -> LogitEmbedder:
    """The model under the spec of ``like``, as a resume opens it."""
    return TorchSource(locate_model(EmbeddingConfig(model=str(MODEL), **TRUSTED))).reopen(like.spec, like.basis_VR)


def assert_same_bytes(first: LogitEmbedder, second: LogitEmbedder) -> None:
    for expected, found in zip(embed(first, PROMPTS), embed(second, PROMPTS), strict=True):
        assert expected.emb_BV.tobytes() == found.emb_BV.tobytes()
        assert expected.coord_BR.tobytes() == found.coord_BR.tobytes()


def test_rows_are_means_of_the_packages_own_logits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    state = make_state()
    make_base(base, CONFIG, state)
    capfd.readouterr()
    embedder = open_embedder(MODEL, PROMPTS, tmp_path / "work", **TRUSTED)
    assert capfd.readouterr().out == ""  # the package prints what it pads: not into --json
    assert (embedder.spec.head.kind, embedder.spec.dimension) == ("capped", 290)
    assert max(map(len, IDS)) > 40
    logits, _ = oracle(state, monkeypatch)
    assert np.concatenate(logits).std() > 5
    expected_NV = np.stack([unit_mean(logits_TV[1:]) for logits_TV in logits])  # <|bos|> is not pooled
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_NV).max() <= 5e-6


def test_hidden_rows_are_what_the_output_layer_is_given(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    make_base(base, CONFIG, state)
    embedder = open_embedder(MODEL, PROMPTS, tmp_path / "work", space="hidden", **TRUSTED)
    assert (embedder.spec.head.kind, embedder.spec.dimension) == ("none", 32)
    expected_ND = np.stack([unit_mean(state_TD[1:]) for state_TD in oracle(state, monkeypatch)[1]])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_ND).max() <= 5e-6


@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_threads_and_a_resume_move_no_byte(space: str, base: Path, tmp_path: Path) -> None:
    make_base(base, CONFIG, make_state())
    settings = TRUSTED | {"space": space, "batch_tokens": 256}  # several batches, two at a time
    first = open_embedder(MODEL, PROMPTS, tmp_path / "work 1", **settings)
    again = open_embedder(MODEL, PROMPTS, tmp_path / "work 2", **settings | {"threads": 2})
    assert_same_bytes(first, again)
    assert_same_bytes(first, resumed(first))


@pytest.mark.parametrize(("cap", "head"), [("20.0", "capped"), ("1e30", "affine")])
def test_the_soft_cap_is_the_packages_own(
    cap: str, head: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(later_gpt.write_package(tmp_path / "other", f"SOFT_CAP = {cap}")))
    monkeypatch.setattr(later_gpt, "SOFT_CAP", float(cap))
    state = make_state()
    make_base(base, CONFIG, state)
    embedder = open_embedder(MODEL, PROMPTS, tmp_path / "work", **TRUSTED)
    assert embedder.spec.head.kind == head
    expected_NV = np.stack([unit_mean(logits_TV[1:]) for logits_TV in oracle(state, monkeypatch)[0]])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_NV).max() <= 5e-6


def test_a_head_of_another_kind_is_streamed_by_the_packages_code(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (
        "_forward = GPT.forward",
        "GPT.forward = lambda self, idx: _forward(self, idx).clamp_min(-5.0)",
    )
    monkeypatch.syspath_prepend(str(later_gpt.write_package(tmp_path / "other", *lines)))
    state = make_state()
    make_base(base, CONFIG, state)
    embedder = open_embedder(MODEL, PROMPTS, tmp_path / "work", **TRUSTED)
    assert embedder.spec.head.kind == "streamed"
    expected_NV = np.stack([unit_mean(logits_TV[1:].clip(-5)) for logits_TV in oracle(state, monkeypatch)[0]])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_NV).max() <= 5e-6


def test_a_bfloat16_backbone_computes_in_bfloat16_beside_one_in_float32(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    make_base(base, CONFIG, state)
    full = open_embedder(MODEL, PROMPTS, tmp_path / "work 1", **TRUSTED)
    lower = open_embedder(MODEL, PROMPTS, tmp_path / "work 2", dtype="bfloat16", **TRUSTED)
    expected_NV = np.stack([unit_mean(logits_TV[1:]) for logits_TV in oracle(state, monkeypatch)[0]])
    assert 1e-4 < distances(rows_before_rounding(lower, PROMPTS), expected_NV).max() < 0.1
    assert distances(rows_before_rounding(full, PROMPTS), expected_NV).max() <= 5e-6
    with torch.inference_mode():
        dtypes = [each._model.backbone(torch.tensor([IDS[0]])).last_hidden_state.dtype for each in (lower, full)]
    assert dtypes == [torch.bfloat16, torch.float32]
    assert_same_bytes(lower, resumed(lower))


def test_a_package_with_bfloat16_tables_keeps_them(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As until March 2026: no global, and the tables are asserted to be bfloat16, whatever the weights are."""
    lines = (
        "_COMPUTE, _tables = torch.float32, GPT.tables",
        "GPT.tables = lambda self: tuple(table.bfloat16() for table in _tables(self))",
    )
    site = later_gpt.write_package(tmp_path / "other", *lines)
    code = site / "nanochat" / "gpt.py"
    text = code.read_text(encoding="utf-8").replace(
        "assert self.cos.dtype == COMPUTE_DTYPE", "assert self.cos.dtype == torch.bfloat16"
    )
    code.write_text(
        text.replace("COMPUTE_DTYPE", "_COMPUTE").replace("import _COMPUTE", "import COMPUTE_DTYPE as _"), encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(site))
    make_base(base, CONFIG, make_state())
    first = open_embedder(MODEL, PROMPTS, tmp_path / "work", **TRUSTED)
    assert_same_bytes(first, resumed(first))


def test_the_process_is_left_as_it_was(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training program around us may have the package loaded, in another dtype."""
    make_base(base, CONFIG, make_state())
    monkeypatch.setitem(sys.modules, "kernels", "theirs")
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # with handlers, basicConfig does nothing
    import nanochat.gpt as theirs

    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    before = (theirs.COMPUTE_DTYPE, list(root.handlers), root.level, torch.random.get_rng_state().tolist())
    files = locate_model(EmbeddingConfig(model=str(MODEL), **TRUSTED))
    loaded = files.load("logits")
    loaded.model.base_model.compute_in(torch.float64)
    assert (theirs.COMPUTE_DTYPE, list(root.handlers), root.level, torch.random.get_rng_state().tolist()) == before
    assert (sys.modules["nanochat.gpt"], sys.modules["kernels"]) == (theirs, "theirs")
    assert os.environ["NANOCHAT_DTYPE"] == "bfloat16"
    assert usable_positions(loaded.model) == 128


def test_a_single_token_is_taken(base: Path) -> None:
    """The package asserts two; the probe may have one."""
    make_base(base, CONFIG, make_state())
    model = locate_model(EmbeddingConfig(model=str(MODEL), **TRUSTED)).load("logits").model
    with torch.inference_mode():
        one, two = (model(input_ids=torch.tensor([ids])).logits for ids in ([258], [258, 65]))
        assert torch.allclose(one[:, 0], two[:, 0], atol=1e-5)
        assert one.shape == (1, 1, 290)
        assert model.base_model(input_ids=torch.tensor([[258]])).last_hidden_state.shape == (1, 1, 32)


def test_the_installed_package_is_part_of_the_identity(base: Path, tmp_path: Path) -> None:
    make_base(base, CONFIG, make_state())
    files = locate_model(EmbeddingConfig(model=str(MODEL)))
    before = files.identity()
    assert before == files.identity()
    assert before.architecture == "nanochat.gpt.GPT"
    with (tmp_path / "site" / "nanochat" / "common.py").open("a") as file:
        file.write("# pulled\n")
    assert files.identity().config_sha256 != before.config_sha256
    assert files.identity().weights_sha256 == before.weights_sha256


def _refusal(base: Path, state: dict[str, Any], config: dict[str, Any] = CONFIG) -> ModelError:
    make_base(base, config, state)
    with pytest.raises(ModelError) as caught:
        locate_model(EmbeddingConfig(model=str(MODEL), **TRUSTED)).load("logits")
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def test_without_the_package_the_first_misfit_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nanochat", None)
    refusal = _refusal(base, make_state())
    assert "setting window_pattern, which transformers' NanoChat class does not know (1 in total)" in refusal.message
    assert "nanochat is not installed" in refusal.message
    assert "https://github.com/karpathy/nanochat" in str(refusal.hint)
    assert "PYTHONPATH" in str(refusal.hint)
    with pytest.raises(ModelError, match="window_pattern"):
        locate_model(EmbeddingConfig(model=str(MODEL))).identity()


def test_a_folder_of_checkpoints_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nanochat" / "base_checkpoints").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_package() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resid_lambdas": None}, "tensor resid_lambdas, which the package has, but the checkpoint lacks (1 in total)"),
        ({"lm_head.weight": None}, "tensor lm_head.weight, which the package has, but the checkpoint lacks"),
        ({"smear_lambda": torch.ones(1)}, "tensor smear_lambda, which the package does not know (1 in total)"),
        ({"resid_lambdas": torch.ones(4)}, "size mismatch for resid_lambdas"),
    ],
)
def test_tensors_must_be_those_of_the_package(change: dict[str, torch.Tensor | None], message: str, base: Path) -> None:
    state = {name: tensor for name, tensor in (make_state() | change).items() if tensor is not None}
    assert message in _refusal(base, state).message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"ngrams": 2}, "setting ngrams, which the package does not know (1 in total)"),
        # the package's default of today is no answer
        ({key: value for key, value in CONFIG.items() if key != "window_pattern"}, "setting window_pattern, which the"),
        (CONFIG | {"n_head": 0}, "cannot be built with the nanochat in"),
        ({}, "model_config has no n_layer"),
    ],
)
def test_settings_must_be_those_of_the_package(config: dict[str, Any], message: str, base: Path) -> None:
    assert message in _refusal(base, make_state(), config).message


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("del GPT", "has no attribute 'GPT'"),
        ("import kernels", "import of kernels halted"),  # flash-attention without a way around it
        ("GPT.forward = lambda self, idx: idx[..., None]", "does not end in lm_head"),
    ],
)
def test_a_package_that_cannot_be_used_is_refused(
    lines: str, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(later_gpt.write_package(tmp_path / "other", lines)))
    assert message in _refusal(base, make_state()).message
    assert not [name for name in sys.modules if name.split(".")[0] == "nanochat"]
    assert sys.modules.get("kernels", "as before") is not None


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"model_config": 3}', '{"model_config": {"n_layer": "2"}}'])
def test_a_damaged_meta_file_is_refused(meta: str, base: Path) -> None:
    folder = make_base(base, CONFIG, make_state())
    (folder / "meta_000100.json").write_text(meta)
    with pytest.raises(ModelError, match="model_config"):
        locate_model(EmbeddingConfig(model=str(MODEL))).identity()


def test_no_code_in_a_weight_file_runs(base: Path, tmp_path: Path) -> None:
    state = make_state() | {"resid_lambdas": Evil(tmp_path / "ran")}
    assert "cannot be read" in _refusal(base, state).message
    with pytest.raises(ModelError, match="cannot be read"):
        locate_model(EmbeddingConfig(model=str(MODEL))).identity()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("content", "message"), [(b"", "cannot be read"), (b"no zip", "cannot be read")])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, message: str, base: Path) -> None:
    folder = make_base(base, CONFIG, make_state())
    (folder / "model_000100.pt").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        locate_model(EmbeddingConfig(model=str(MODEL))).identity()


def test_a_file_that_is_no_state_dict_is_refused(base: Path) -> None:
    assert "is not a state dict" in _refusal(base, {"model": {"lm_head.weight": torch.ones(1)}}).message


def test_what_is_mapped_needs_no_package(base: Path) -> None:
    """A checkpoint of the first generation is the same model, and has the same identity, whatever is installed."""
    from tests.oracle import test_nanochat as first

    make_base(base, first.CONFIG, first.make_state())
    identity = locate_model(EmbeddingConfig(model=str(MODEL))).identity()
    assert identity.architecture == "NanoChatForCausalLM"
    assert json.loads((base / "base_checkpoints" / "d2" / "meta_000100.json").read_text())["model_config"] == first.CONFIG
