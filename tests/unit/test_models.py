"""Finding, identifying and loading a model: what is refused and how, what never runs, and which dtype ``auto`` takes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray

from embstore.core.config import DTypeChoice, EmbeddingConfig
from embstore.core.errors import ConfigError, EmbstoreError, ModelError
from embstore.core.events import Event, Notice
from embstore.host.device import has_fast_bfloat16, resolve_device
from embstore.model import dtype_choice, source
from embstore.model.locate import locate_model
from tests.support.models import PROMPTS, make_model, make_tokenizer, open_embedder, rows_before_rounding, save_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder; read it, never write to it."""
    return save_model(tmp_path_factory.mktemp("model") / "llama", make_model("llama"), make_tokenizer())


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A complete model folder of the test's own."""
    return Path(shutil.copytree(llama, tmp_path / "own"))


def refusal(kind: type[EmbstoreError], act: Callable[[], object]) -> str:
    """The message of a refusal, which must be one line with a next step and no traceback."""
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert "Traceback" not in caught.value.message
    return caught.value.message


def locate(model: str | Path | None, **settings: object) -> Callable[[], object]:
    return lambda: locate_model(EmbeddingConfig(model=None if model is None else str(model), **settings))


def only_bin(folder: Path) -> Path:
    """Turn a folder into one that has nothing but ``.bin`` weights."""
    (weights,) = folder.glob("*.safetensors")
    torch.save(safetensors.torch.load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def test_no_model_is_a_config_error() -> None:
    refusal(ConfigError, locate(None))


@pytest.mark.parametrize("written", ["./absent", "/absent/model", "~/absent"])
def test_a_path_that_is_not_there_never_goes_to_the_hub(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert f"{written} is not a folder" in refusal(ModelError, locate(written))


def test_a_file_is_no_model_folder(folder: Path) -> None:
    assert "is not a folder" in refusal(ModelError, locate(folder / "config.json"))


@pytest.mark.parametrize(
    ("removed", "complaint"),
    [
        ("config.json", "config.json is missing"),
        ("tokenizer*", "contains no tokenizer"),
        ("*.safetensors", "contains no weights"),
    ],
)
def test_an_incomplete_folder_is_refused_by_what_it_lacks(folder: Path, removed: str, complaint: str) -> None:
    for path in folder.glob(removed):
        path.unlink()
    message = refusal(ModelError, locate(folder))
    assert str(folder) in message
    assert complaint in message


def test_a_revision_needs_a_hub_id(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--revision v2 .* is a local folder"):
        locate(folder, revision="v2")()


@pytest.mark.parametrize("hub_id", ["some-org/no-such-model", "gpt-missing"])
def test_a_hub_id_out_of_reach_is_one_line(hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert refusal(ModelError, locate(hub_id)).startswith(f"{hub_id} is not a local folder, and the hub answered: ")


def test_a_bin_folder_gives_the_rows_of_its_safetensors(llama: Path, folder: Path, tmp_path: Path) -> None:
    expected_NV = rows_before_rounding(open_embedder(llama, PROMPTS, tmp_path / "first"), PROMPTS)
    assert np.array_equal(
        rows_before_rounding(open_embedder(only_bin(folder), PROMPTS, tmp_path / "second"), PROMPTS), expected_NV
    )


class Touch:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_bin_is_refused_and_does_not_run(folder: Path, zipped: bool, tmp_path: Path) -> None:
    weights, trap = only_bin(folder) / "pytorch_model.bin", tmp_path / "sprung"
    torch.save({"lm_head.weight": Touch(trap)}, weights, _use_new_zipfile_serialization=zipped)
    files = locate_model(EmbeddingConfig(model=str(folder)))
    assert "contains more than tensors" in refusal(ModelError, lambda: files.load("logits"))
    assert not trap.exists()
    torch.load(weights, weights_only=False)
    assert trap.exists()  # the trap was real


@pytest.mark.parametrize("trusted", [False, True])
def test_code_in_the_folder_runs_only_when_trusted(
    folder: Path, trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    trap = tmp_path / "sprung"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "home-made", "auto_map": {"AutoConfig": "home_made.HomeMadeConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "home_made.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    files = locate_model(EmbeddingConfig(model=str(folder), trust_remote_code=trusted or None))
    assert files.trust_remote_code == files.identity().trust_remote_code == trusted
    refusal(ModelError, lambda: files.load("logits"))
    assert trap.exists() == trusted


def test_weights_that_lack_a_tensor_are_refused(folder: Path) -> None:
    """The library would fill it with random numbers: other rows on every run."""
    (weights,) = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(weights)
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    files = locate_model(EmbeddingConfig(model=str(folder)))
    assert "lack 1 tensors of LlamaForCausalLM, such as lm_head.weight" in refusal(ModelError, lambda: files.load("logits"))


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_config(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


def append_space(path: Path) -> None:
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize(
    ("file", "change", "field"),
    [
        ("model.safetensors", flip_last_byte, "weights_sha256"),
        ("config.json", change_config, "config_sha256"),
        ("tokenizer.json", append_space, "tokenizer_sha256"),
        ("tokenizer_config.json", append_space, "tokenizer_sha256"),
    ],
)
def test_identity_follows_content(llama: Path, folder: Path, file: str, change: Callable[[Path], None], field: str) -> None:
    before = dataclasses.asdict(locate_model(EmbeddingConfig(model=str(llama))).identity())
    change(folder / file)
    after = dataclasses.asdict(locate_model(EmbeddingConfig(model=str(folder))).identity())
    assert {name for name in before if before[name] != after[name]} == {field, "name"}


def test_identity_has_no_path_and_ignores_how_the_config_is_laid_out(llama: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    first = locate_model(EmbeddingConfig(model=str(llama))).identity()
    second = locate_model(EmbeddingConfig(model=str(folder))).identity()
    assert (first.name, second.name) == ("llama", "own")
    assert dataclasses.replace(second, name=first.name) == first
    assert first.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "meta", "banana"])
def test_a_device_that_is_not_there_is_a_config_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device in refusal(ConfigError, lambda: resolve_device(device))
    assert resolve_device("auto").type == "cpu"


def test_a_gpu_number_beyond_the_last_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "cuda:2" in refusal(ConfigError, lambda: resolve_device("cuda:2"))
    assert resolve_device("cuda:1").index == 1


def test_fast_bfloat16_is_what_the_kernel_says_of_the_processor() -> None:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    assert has_fast_bfloat16(torch.device("cpu")) == bool(words & {"avx512_bf16", "amx_bf16"})


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"_is_avx512_bf16_supported": True, "_is_amx_tile_supported": False}, True),
        ({"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": True}, True),
        ({"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": False}, False),
        ({}, False),
    ],
)
def test_torch_before_2_11_is_asked_by_its_private_names(
    answers: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = {name: lambda answer=answer: answer for name, answer in answers.items()}
    monkeypatch.setattr("torch.cpu", SimpleNamespace(**functions))
    assert has_fast_bfloat16(torch.device("cpu")) == expected


class OlderTransformers:
    """transformers without the name that version 5 gave to PreTrainedTokenizerFast."""

    def __getattr__(self, name: str) -> object:
        if name == "TokenizersBackend":
            raise AttributeError(name)
        return getattr(transformers, name)


def test_transformers_4_loads_a_tokenizer_that_transformers_5_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 4 gives up at the new name of the class."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend"}))
    monkeypatch.setattr("embstore.model.load.transformers", OlderTransformers())
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("asked by that name"))
    found = locate_model(EmbeddingConfig(model=str(folder))).load("logits").tokenizer
    assert [found(each.text).input_ids for each in PROMPTS] == [make_tokenizer()(each.text).input_ids for each in PROMPTS]


def chosen_dtype(
    folder: Path, work: Path, *, fast: bool, monkeypatch: pytest.MonkeyPatch, dtype: DTypeChoice = "auto"
) -> tuple[str, list[str]]:
    """The dtype of the layers, and the notices on the way."""
    events: list[Event] = []
    for module in (dtype_choice, source):
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda device: fast)
    embedder = open_embedder(folder, PROMPTS, work, dtype=dtype, max_tokens=64, observer=events.append)
    return embedder.spec.dtype, [event.message for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize(("fast", "expected"), [(False, "float32"), (True, "bfloat16")])
def test_auto_takes_bfloat16_only_where_it_is_fast(
    llama: Path, fast: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen_dtype(llama, tmp_path, fast=fast, monkeypatch=monkeypatch) == (expected, [])


@pytest.mark.parametrize("fast", [False, True])
def test_emulated_bfloat16_is_said_to_be_slow(
    llama: Path, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An 8B checkpoint that takes minutes on one processor took an hour on another, without a word."""
    dtype, notices = chosen_dtype(llama, tmp_path, fast=fast, monkeypatch=monkeypatch, dtype="bfloat16")
    assert dtype == "bfloat16"
    assert ["emulates it" in notice for notice in notices] == [True] * (not fast)


def test_auto_stays_in_float32_where_bfloat16_moves_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings that differ by less than bfloat16 resolves: all that tells prompts apart is rounded away."""
    model = make_model("llama")
    model.get_input_embeddings().weight.add_(torch.linspace(4, 8, model.config.hidden_size))
    folder = save_model(tmp_path / "model", model, make_tokenizer())
    dtype, notices = chosen_dtype(folder, tmp_path / "work", fast=True, monkeypatch=monkeypatch)
    assert dtype == "float32"
    assert ["using float32: bfloat16 would change the weights by TV" in notice for notice in notices] == [True]


@pytest.mark.parametrize(("stored", "expected"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float32")])
def test_auto_takes_what_is_stored_where_a_comparison_is_too_dear(
    stored: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float16 is not computed in: models that were trained in bfloat16 overflow there."""
    monkeypatch.setattr(dtype_choice, "_COMPARED_FLOPS", 0.0)
    monkeypatch.setattr(dtype_choice, "mean_distances", lambda *_: pytest.fail("compared"))
    folder = save_model(tmp_path / "model", make_model("llama").to(getattr(torch, stored)), make_tokenizer())
    dtype, notices = chosen_dtype(folder, tmp_path / "work", fast=True, monkeypatch=monkeypatch)
    assert dtype == expected
    assert [f"using {expected}, " in notice and "nothing was compared" in notice for notice in notices] == [True]


def test_a_comparison_takes_5_percent_of_the_pass_or_a_few_seconds() -> None:
    def compared(parameters: float, num_rows: int) -> int:
        model: Any = types.SimpleNamespace(backbone_parameters=parameters)
        return dtype_choice.compared_rows(model, num_rows, mean_tokens=100.0)

    assert compared(3.3e6, 100) == compared(3.3e6, 28_000) == 256  # cheap whatever the pass
    assert compared(7e9, 64) == compared(7e9, 5_000) == 0
    assert compared(7e9, 8_000) == 50  # a float32 row costs 8 in bfloat16
    assert compared(7e9, 1_000_000) == 256


def test_auto_leaves_no_trace_of_its_probe(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 embedder after a refused probe gives the rows of one that never probed."""
    monkeypatch.setattr(dtype_choice, "_MAX_TV", -1.0)
    monkeypatch.setattr(dtype_choice, "has_fast_bfloat16", lambda device: True)
    probed = open_embedder(llama, PROMPTS, tmp_path / "first", dtype="auto")
    plain = open_embedder(llama, PROMPTS, tmp_path / "second", dtype="float32")
    assert probed.spec == plain.spec
    rows: list[NDArray[np.float64]] = [rows_before_rounding(embedder, PROMPTS) for embedder in (probed, plain)]
    assert np.array_equal(*rows)
