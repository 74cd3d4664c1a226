"""A loaded checkpoint is what its files hold: each tensor mapped and in its own dtype, nothing missing, left over, cast."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError
from embstore.core.prompts import Prompt
from embstore.model.dtypes import stored_dtype
from embstore.model.load import whole_in_float32
from embstore.model.locate import locate_model
from embstore.model.tokens import PromptTokenizer
from tests.support.kinds import as_8_bits
from tests.support.models import (
    CONFIGS,
    PROMPTS,
    make_model,
    make_tokenizer,
    open_embedder,
    rows_before_rounding,
    save_model,
)

ROOT = Path(__file__).parents[2]

_MEASURE = """
import sys, threading, time
import torch, transformers
import transformers.models.llama.modeling_llama, transformers.models.mixtral.modeling_mixtral
from embstore.core.config import EmbeddingConfig
from embstore.model.locate import locate_model

def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return (int(fields["VmRSS"].split()[0]) - int(fields["RssFile"].split()[0])) / 1024

files = locate_model(EmbeddingConfig(model=sys.argv[1]))
before, peak, done = anonymous(), [0.0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
model = files.load("logits").model
done.set()
watcher.join()
stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
print(max(peak[0], anonymous()) - before, stored)
"""


def saved(name: str, folder: Path, **changes: object) -> Path:
    """A random model in bfloat16, of another size than the tests' own."""
    config = CONFIGS[name]()
    config.update(changes)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return save_model(folder, model.to_empty(device="cpu"), make_tokenizer())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "changes", "in_8_bits"),
    [
        ("llama", {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 1000}, False),
        # dequantised into scratch files
        pytest.param(
            "llama",
            {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 1000},
            True,
            marks=pytest.mark.slow,
        ),
        # fused from files of single experts: written to scratch files, the largest tensor is 16 MiB
        ("mixtral", {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_local_experts": 8}, False),
    ],
)
def test_a_model_of_200_mb_takes_less_than_60_mb_of_anonymous_memory(
    name: str, changes: dict[str, object], in_8_bits: bool, tmp_path: Path
) -> None:
    folder = saved(name, tmp_path / "model", **changes)
    command = [sys.executable, "-c", _MEASURE, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    if in_8_bits:
        as_8_bits(folder, block=128)
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    anonymous_mib, stored_mib = map(float, done.stdout.split())
    assert stored_mib > 180
    assert anonymous_mib < 60
    assert {path.name for path in tmp_path.iterdir()} == {"model"}  # no scratch file is left


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "own", make_model("llama"), make_tokenizer())


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a saved model."""
    (path,) = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def load(folder: Path, space: str = "logits") -> Any:
    return locate_model(EmbeddingConfig(model=str(folder))).load(space).model  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mamba", "falcon-h1", "deepseek-v3", "mixtral", "gpt2", "gemma2"])
@pytest.mark.parametrize("said", ["bfloat16", "float32", None])
def test_each_tensor_stays_in_the_dtype_of_its_file_whatever_the_configuration_says(
    name: str, said: str | None, tmp_path: Path
) -> None:
    """Mamba's A_log is published in float32 among bfloat16 weights, and some configurations name another dtype."""
    folder = save_model(tmp_path / "model", make_model(name), make_tokenizer())
    kept: list[str] = []

    def round_most(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if tensor.dim() == 1:
                kept.append(key)
            else:
                tensors[key] = tensor.to(torch.bfloat16)

    edit(folder, round_most)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": said}))
    model = load(folder)
    assert kept
    for key, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.dim() == 1 else torch.bfloat16), key
        assert not parameter.requires_grad
        assert type(parameter.data) is torch.Tensor
    assert not model.training
    assert stored_dtype(model) == torch.bfloat16
    # and so float32 computes with what the file has
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = whole_in_float32(locate_model(EmbeddingConfig(model=str(folder))).load("logits"))
    tensors = dict(found.named_parameters()) | dict(found.named_buffers())
    for key, each in (*expected.named_parameters(), *expected.named_buffers()):
        assert tensors[key].dtype == each.dtype
        assert torch.equal(tensors[key], each), key


@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.q_norm.weight", "model.layers.7.mlp.up_proj.weight", "model.norm2.weight", "extra"]
)
@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_a_tensor_that_no_layer_takes_is_refused(folder: Path, key: str, space: str) -> None:
    """A checkpoint of Qwen3 as a Llama would give other rows, silently."""
    edit(folder, lambda tensors: tensors.update({key: torch.ones(8)}))
    with pytest.raises(ModelError, match=f"does not use 1 tensors of the weight files, such as .*{key.split('.')[-2:][0]}"):
        load(folder, space)


def test_a_layer_that_is_called_as_a_head_elsewhere_is_refused(tmp_path: Path) -> None:
    """ "decoder" is the head of some encoders, and where OPT has its layers."""
    folder = save_model(tmp_path / "model", make_model("opt"), make_tokenizer())
    edit(folder, lambda tensors: tensors.update({"model.decoder.layers.0.extra.weight": torch.ones(8)}))
    with pytest.raises(ModelError, match=r"does not use 1 tensors of the weight files, such as .*layers\.0\.extra"):
        load(folder, "hidden")


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.0.attn.masked_bias",
        "mtp.layers.0.mlp.up_proj.weight",
        "v_head.summary.weight",
    ],
)
def test_harmless_tensors_are_left_out(folder: Path, key: str, tmp_path: Path) -> None:
    expected_NV = rows_before_rounding(open_embedder(folder, PROMPTS, tmp_path / "first"), PROMPTS)
    edit(folder, lambda tensors: tensors.update({key: torch.ones(8)}))
    assert np.array_equal(rows_before_rounding(open_embedder(folder, PROMPTS, tmp_path / "second"), PROMPTS), expected_NV)


def test_layers_behind_the_last_are_harmless_where_they_predict_further_tokens(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", make_model("deepseek-v3"), make_tokenizer())
    edit(folder, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.ones(8)}))
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    for number, is_refused in ((0, True), (1, False)):
        (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": number}))
        with pytest.raises(ModelError, match=r"layers\.2\.eh_proj") if is_refused else contextlib.nullcontext():
            load(folder)
    edit(folder, lambda tensors: tensors.update({"model.layers.1.eh_proj.weight": torch.ones(8)}))
    with pytest.raises(ModelError, match="does not use 1 tensors"):
        load(folder)


def test_a_tensor_of_another_shape_is_refused_with_both(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(60, 32)}))
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has the shape \(60, 32\) .* \(64, 32\)"
    ) as caught:
        load(folder)
    assert caught.value.hint


@pytest.mark.parametrize("pad", [-1, 320, 5000])
def test_a_pad_token_beyond_the_table_is_not_used(pad: int, tmp_path: Path) -> None:
    """Thousands of fine-tunes added a pad token and did not resize the model."""
    model = make_model("llama")
    expected = save_model(tmp_path / "expected", model, make_tokenizer())
    folder = Path(shutil.copytree(expected, tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    tokenizer = make_tokenizer()
    fillers = [f"<filler{number}>" for number in range(400)]
    tokenizer.add_tokens([tokenizers.AddedToken(each, special=True) for each in fillers])
    tokenizer.pad_token = fillers[-1]
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id >= model.config.vocab_size
    embedder = open_embedder(folder, PROMPTS, tmp_path / "first")
    assert embedder._tokenizer.pad_id == tokenizer.eos_token_id
    rows_NV = rows_before_rounding(embedder, PROMPTS)
    assert np.array_equal(rows_NV, rows_before_rounding(open_embedder(expected, PROMPTS, tmp_path / "second"), PROMPTS))


@pytest.mark.parametrize(
    ("pad", "eos", "expected"),
    [(7, 1, 7), (None, 1, 1), (None, None, 0), (-1, 1, 1), (320, 1, 1), (320, 999, 0), (320, [1, 2], 0)],
)
def test_the_pad_token_is_always_one_of_the_table(pad: int | None, eos: Any, expected: int) -> None:
    class Named:
        def __init__(self) -> None:
            self.pad_token_id, self.eos_token_id = pad, eos
            self.added_tokens_decoder: dict[int, Any] = {}
            self.all_special_ids: list[int] = []

    assert PromptTokenizer(Named(), 16, 320, chat_date=None).pad_id == expected


def test_a_tokenizer_without_an_end_of_text(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", make_model("llama"), make_tokenizer(eos=None, pad=None))
    embedder = open_embedder(folder, PROMPTS, tmp_path / "work")
    assert len(rows_before_rounding(embedder, [*PROMPTS, Prompt(id=None, text="the")])) == len(PROMPTS) + 1


def test_a_tokenizer_of_mistral_common_alone_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(ModelError, match=r"only a tokenizer of mistral-common \(tekken\.json\)") as caught:
        locate_model(EmbeddingConfig(model=str(folder)))
    assert "tokenizer.json" in str(caught.value.hint)


def test_an_installed_mistral_common_changes_no_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers prefers it for Mistral's models; its chats and special tokens follow other rules."""

    class MistralCommonBackend:
        pass

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: MistralCommonBackend())
    files = locate_model(EmbeddingConfig(model=str(folder)))
    found = files.load("logits").tokenizer
    assert [found(each.text).input_ids for each in PROMPTS] == [make_tokenizer()(each.text).input_ids for each in PROMPTS]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="only a tokenizer of mistral-common"):
        files.load("logits")


def test_a_home_folder_is_expanded_and_a_relative_one_resolved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = locate_model(EmbeddingConfig(model=str(folder))).identity()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate_model(EmbeddingConfig(model="~/own")).identity() == expected
    monkeypatch.chdir(folder)
    assert locate_model(EmbeddingConfig(model=".")).identity() == expected
