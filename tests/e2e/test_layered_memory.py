"""A model in less memory than its file takes, in processes of their own; and a store that is the same in either order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from embstore.host.memory import read_memory
from tests.support.models import VOCABULARY, make_model, make_tokenizer, save_model

needs_memory = pytest.mark.skipif(read_memory() is None, reason="the kernel does not tell anonymous memory (not Linux)")
SECONDS = 600  # a hard limit, not an expectation


def run(*command: object) -> str:
    """What a process prints."""
    words = [str(word) for word in command]
    result = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stderr
    return result.stdout


_MANY_BATCHES = """
import re
import sys
from pathlib import Path
from embstore.core.config import EmbeddingConfig
from embstore.core.prompts import Prompt
from embstore.host.allocator import give_back
from embstore.host.memory import MemoryMeter
from embstore.model.locate import locate_model
from embstore.model.source import TorchSource
from tests.support.models import PromptList

model, work, memory = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = EmbeddingConfig(model=str(model), dtype="float32", device="cpu", threads=2, batch_tokens=64)
prompts = [Prompt(id=None, text=f"{row} " + "many words of one length " * 4) for row in range(4000)]
source = TorchSource(locate_model(config), model_memory_bytes=memory)
embedder = source.create(PromptList(prompts[:300]), config, memory_bytes=4 << 30, work=work, observer=lambda event: None)
assert embedder.model.residency is not None
rows = embedder.tokens(prompts)
most_threads = 0

def check():
    global most_threads
    threads = int(re.search(r"Threads:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
    most_threads = max(most_threads, threads)

for num_batches in (10, 10, 1000):
    per_batch = 64 // max(len(row.ids_T) for row in rows)
    most_threads = 0
    give_back()
    with MemoryMeter() as meter:
        meter.set_baseline()
        embedder.pool(rows[:num_batches * per_batch], check)
        print(most_threads, meter.peak_anonymous_bytes, 64 * num_batches * embedder.model.waiting_bytes_per_token)
"""


@needs_memory
def test_a_thousand_batches_take_no_more_threads_and_the_memory_that_was_planned(tmp_path: Path) -> None:
    folder = save_model(
        tmp_path / "model", make_model("llama", layers=4, hidden_size=256, intermediate_size=512), make_tokenizer()
    )
    work = tmp_path / "work"
    work.mkdir()
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder).model.layers[0]
    memory = 2 * 4 * sum(each.numel() for each in weights.parameters()) + (1 << 20)
    lines = [[int(word) for word in line.split()] for line in run("-c", _MANY_BATCHES, folder, work, memory).splitlines()]
    (_, _, _), (few_threads, few_bytes, _), (threads, many_bytes, planned_bytes) = lines
    assert threads <= few_threads
    assert planned_bytes >= 64 << 20  # or the bound says nothing
    assert many_bytes - few_bytes <= 1.3 * planned_bytes + (32 << 20)


_BUILD = """
import json
import os
import sys
from pathlib import Path
import transformers
import hnswlib
import embstore
from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.events import RowsCommitted
from embstore.host.memory import MemoryMeter

prompts, model, out, options = sys.argv[1:]
options = json.loads(options)
is_killed, memory = options.pop("is_killed", False), options.pop("model_memory", None)

def watch(event):
    if is_killed and isinstance(event, RowsCommitted):
        os._exit(0)  # nothing is cleaned up

with MemoryMeter() as meter:
    meter.set_baseline()
    config = EmbeddingConfig(model=model, device="cpu", threads=2, **options)
    config = BuildConfig(embedding=config, model_memory_bytes=memory)
    embstore.build(prompts, out=out, config=config, observer=watch, resume=Path(out).exists())
    print(meter.peak_anonymous_bytes)
"""


def write_prompts(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"prompt number {row} of " + "many " * (row % 9)}) + "\n" for row in range(count))
    )
    return path


def build(prompts: Path, model: Path, out: Path, **options: Any) -> int:
    """Peak of the process's anonymous memory above its imports, of a whole build."""
    printed = run("-c", _BUILD, prompts, model, out, json.dumps(options))
    return int(printed or 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers of 32 MiB in bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    return save_model(tmp_path_factory.mktemp("large") / "model", model, make_tokenizer())


LAYER_BYTES = 32 << 20
FIXED_BYTES = 400 << 20  # modules that are imported late, kernels of oneDNN, activations, the search


@pytest.mark.slow  # bfloat16 is emulated on many processors; the test of a thousand batches has the same bound
@needs_memory
def test_a_model_is_built_in_the_memory_of_a_few_layers(large: Path, tmp_path: Path) -> None:
    """Probes in float32 too, where two layers are twice as large."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 16)
    asked_bytes = 2 * LAYER_BYTES + (1 << 20)
    peak_bytes = build(prompts, large, tmp_path / "store", dtype="bfloat16", model_memory=asked_bytes)
    assert LAYER_BYTES < peak_bytes <= 4 * LAYER_BYTES + FIXED_BYTES


@needs_memory
def test_a_build_that_is_told_nothing_makes_no_float32_copy(large: Path, tmp_path: Path) -> None:
    file_bytes = (large / "model.safetensors").stat().st_size
    assert file_bytes > 12 * LAYER_BYTES
    prompts = write_prompts(tmp_path / "prompts.jsonl", 16)
    peak_bytes = build(prompts, large, tmp_path / "store")
    assert LAYER_BYTES < peak_bytes <= 1.3 * file_bytes + (256 << 20)


@pytest.mark.slow  # and tests/oracle/test_layered.py, in one process
def test_a_store_is_the_same_in_either_order_and_where_they_change(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", make_model("llama", layers=4), make_tokenizer())
    layers = transformers.AutoModelForCausalLM.from_pretrained(model).model.layers
    memory = 2 * 4 * sum(each.numel() for each in layers[0].parameters()) + 4096
    prompts = write_prompts(tmp_path / "prompts.jsonl", 90)
    common = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--window-rows",
        "32",
        "--chunk-rows",
        "16",
        "--model",
        model,
        "--json",
    ]
    for name, options in (("plain", []), ("layered", ["--model-memory", memory])):
        run("-m", "embstore", "build", prompts, "--out", tmp_path / name, *common, *options)
    options = {"dtype": "float32", "window_rows": 32, "chunk_rows": 16}
    build(prompts, model, tmp_path / "killed", is_killed=True, model_memory=memory, **options)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert (tmp_path / "killed" / "journal.jsonl").exists()
    build(prompts, model, tmp_path / "killed", **options)
    manifest = (tmp_path / "plain" / "manifest.json").read_bytes()
    for name in ("layered", "killed"):
        assert (tmp_path / name / "manifest.json").read_bytes() == manifest
