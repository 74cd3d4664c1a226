"""Models of the hub, from a fake one on the loopback device: what is downloaded, what is identity, and what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fake_hub import COMMIT, fake_hub
from tests.support.models import make_model, make_tokenizer, save_model

ROOT = Path(__file__).parents[2]

# run in a process of its own: the hub's client reads its settings when it is imported
_PROGRAM = """
import dataclasses, json, sys
import torch
from embstore.core.config import EmbeddingConfig
from embstore.core.errors import EmbstoreError
from embstore.model.load import whole_in_float32
from embstore.model.locate import locate_model

def about(settings):
    try:
        files = locate_model(EmbeddingConfig(**settings))
        loaded = files.load("logits")
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.arange(8)[None]).logits
        return {"identity": dataclasses.asdict(files.identity()), "sum": float(logits.double().sum()),
                "class": type(loaded.model).__name__, "tokens": loaded.tokenizer("the sum").input_ids}
    except EmbstoreError as error:
        return {"refused": error.message, "hint": error.hint}

print(json.dumps([about(settings) for settings in json.loads(sys.argv[1])]))
"""

_CODE = '''
"""A Llama whose logits are twice as large."""
from transformers import LlamaConfig, LlamaForCausalLM

from .configuration_twice import TwiceConfig


class TwiceForCausalLM(LlamaForCausalLM):
    config_class = TwiceConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = FACTOR * output.logits
        return output


FACTOR = 2
'''
_SETTINGS = """
from transformers import LlamaConfig


class TwiceConfig(LlamaConfig):
    model_type = "twice"
"""


def loaded(cache: Path, endpoint: str, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What a process says that loads models with this cache; an endpoint of "" is no network."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(settings)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with everything that real ones have besides the model."""
    folder = save_model(tmp_path / "repository", make_model("llama"), make_tokenizer())
    for extra in ("original/consolidated.safetensors", "consolidated.safetensors", "onnx/model.onnx", "metal/model.bin"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"many gigabytes")
    for extra in ("pytorch_model.bin", "model.gguf", "README.md", "modeling_evil.py", "original/params.json", "tf_model.h5"):
        (folder / extra).write_bytes(b"{}")
    return folder


def test_only_what_is_used_is_downloaded_once(repository: Path, tmp_path: Path) -> None:
    with fake_hub({"org/model": repository}) as hub:
        (first,) = loaded(tmp_path / "cache", hub.endpoint, {"model": "org/model"})
        assert first["class"] == "LlamaForCausalLM"
        names = {name.removeprefix("org/model/") for name in hub.sent}
        assert names == {
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
        }  # fmt: skip
        assert len(hub.sent) == len(names)
        assert hub.revisions == {"main", COMMIT}  # the weights are of the commit of the settings
    cached, local = loaded(tmp_path / "cache", "", {"model": "org/model"}, {"model": str(repository)})  # no network
    assert cached == first
    assert local["sum"] == first["sum"]
    same = {"weights_sha256", "config_sha256", "tokenizer_sha256"}
    assert {key: local["identity"][key] for key in same} == {key: first["identity"][key] for key in same}


def test_shards_are_those_of_the_index_and_bin_is_taken_where_there_is_nothing_else(tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    save_model(sharded, make_model("llama"), make_tokenizer())
    (sharded / "model.safetensors").unlink()
    make_model("llama").save_pretrained(sharded, max_shard_size="40KB")
    (sharded / "model-fp16.safetensors").write_bytes(b"another copy")
    old = save_model(tmp_path / "old", make_model("llama"), make_tokenizer())
    (old / "model.safetensors").unlink()
    torch.save(make_model("llama").state_dict(), old / "pytorch_model.bin")
    with fake_hub({"org/sharded": sharded, "org/old": old}) as hub:
        first, second = loaded(tmp_path / "cache", hub.endpoint, {"model": "org/sharded"}, {"model": "org/old"})
        weights = {name for name in hub.sent if name.endswith(".safetensors")}
        assert len(weights) > 1
        assert "org/sharded/model-fp16.safetensors" not in weights
        assert second["sum"] == first["sum"]
        assert "org/old/pytorch_model.bin" in hub.sent


def test_trusted_code_is_downloaded_runs_and_is_identity(tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", make_model("llama"), make_tokenizer())
    folder = save_model(tmp_path / "twice", make_model("llama"), make_tokenizer())
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_twice.TwiceConfig", "AutoModelForCausalLM": "modeling_twice.TwiceForCausalLM"}
    changes = {"model_type": "twice", "auto_map": classes, "architectures": ["TwiceForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "modeling_twice.py").write_text(_CODE)
    (folder / "configuration_twice.py").write_text(_SETTINGS)
    with fake_hub({"org/twice": folder}) as hub:
        (refused,) = loaded(tmp_path / "cache", hub.endpoint, {"model": "org/twice"})
        assert "--trust-remote-code" in refused["hint"]
        assert not [name for name in hub.sent if name.endswith(".py")]
        trusted, expected, local = loaded(
            tmp_path / "cache",
            hub.endpoint,
            {"model": "org/twice", "trust_remote_code": True},
            {"model": str(plain)},
            {"model": str(folder), "trust_remote_code": True},
        )
    assert trusted["class"] == "TwiceForCausalLM"
    assert trusted["sum"] == pytest.approx(2 * expected["sum"], rel=1e-6)
    assert expected["identity"]["code_sha256"] == ""
    assert local["sum"] == trusted["sum"]
    assert local["identity"]["code_sha256"] == trusted["identity"]["code_sha256"] != ""
    (folder / "modeling_twice.py").write_text(_CODE.replace("FACTOR = 2", "FACTOR = 3"))
    (changed,) = loaded(tmp_path / "cache", "", {"model": str(folder), "trust_remote_code": True})
    assert {key for key in changed["identity"] if changed["identity"][key] != local["identity"][key]} == {"code_sha256"}
    assert changed["sum"] == pytest.approx(3 * expected["sum"], rel=1e-6)
