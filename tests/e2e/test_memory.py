"""The memory promise: anonymous memory above the baseline stays under the budget, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.stage0 import measured
from embstore.host.memory import read_memory
from embstore.model.packed import can_pack
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import write_small_prompts

pytestmark = pytest.mark.skipif(read_memory() is None, reason="the kernel does not tell anonymous memory (not Linux)")


# a process of its own: what earlier tests freed would go in the middle of it, or be taken again without a new page
_METER = """
import mmap, sys, threading
import numpy as np
from embstore.host import memory

path, size = sys.argv[1], int(sys.argv[2])
samples, read_memory = threading.Semaphore(0), memory.read_memory

def read():
    found = read_memory()
    samples.release()
    return found

def sampled_peak(meter):
    while samples.acquire(blocking=False):
        pass
    for _ in range(3):  # one may be under way, one begins now, and is counted when another one begins
        assert samples.acquire(timeout=300), "the meter hangs"
    return meter.peak_anonymous_bytes

memory.read_memory = read
with memory.MemoryMeter() as meter:
    meter.set_baseline()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[offset] for offset in range(0, size, 4096)) > 0  # every page is resident
        print(sampled_peak(meter))
    held = np.ones(size // 8)
    print(sampled_peak(meter))
    assert held[0] == 1
"""


def test_the_meter_counts_what_is_allocated_and_not_what_is_mapped(tmp_path: Path) -> None:
    size = 96 << 20
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    result = subprocess.run([sys.executable, "-c", _METER, path, str(size)], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    mapped, held = map(int, result.stdout.split())
    assert mapped < size // 8
    assert 0.9 * size < held < 1.1 * size  # the kernel counts pages by batches


@pytest.mark.parametrize(
    ("budget_mib", "kind", "words"),
    [
        (96, "llama", 1),
        pytest.param(160, "gemma2", 60, marks=pytest.mark.slow),
        pytest.param(160, "gemma2", 1, marks=pytest.mark.slow),
        pytest.param(160, "modernbert-decoder", 60, marks=pytest.mark.slow),
    ],
)
def test_a_build_stays_under_its_budget(budget_mib: int, kind: str, words: int, tmp_path: Path) -> None:
    # 20,000 columns: rows are 40 kB, a default chunk would be 32 MiB and its float32 work several times that; logits of
    # one batch of 2048 tokens would be 156 MiB
    model = save_model(tmp_path / "model", make_model(kind, vocab_size=20_000, logit_std=1.0), make_tokenizer())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"prompt number {index} of " + "many " * words}) + "\n" for index in range(700))
    )
    command = [sys.executable, "-m", "embstore", "build", prompts, "--model", model, "--out", tmp_path / "store"]
    command += ["--memory-budget", f"{budget_mib}MiB", "--json"]
    result = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = json.loads(result.stdout)["peak_anonymous_bytes"]
    assert 0 < peak <= budget_mib << 20


@pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="this torch packs no linear layers on this processor")
def test_kernels_of_packed_layers_stay_under_the_budget(tmp_path: Path) -> None:
    """Prompts of every length up to 256 tokens: each makes its kernels, which stay."""
    budget = 320 << 20
    model = save_model(tmp_path / "model", make_model("llama", logit_std=1.0, max_position_embeddings=512), make_tokenizer())
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{row} " + "many " * (row % 64)}) + "\n" for row in range(1500)]
    prompts.write_text("".join(lines))
    command = [sys.executable, "-m", "embstore", "build", prompts, "--model", model, "--out", tmp_path / "store"]
    command += ["--memory-budget", budget, "--dtype", "float32", "--json"]
    result = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    embedding = json.loads((tmp_path / "store" / "spec.json").read_text())["embedding"]
    assert embedding["packed_layers"]
    assert embedding["packed_head"]
    assert 0 < json.loads(result.stdout)["peak_anonymous_bytes"] <= budget


def test_copying_rows_stays_under_the_budget(tmp_path: Path) -> None:
    """Also where the old rows lie in another order, and in chunks that a larger budget made."""
    model = save_model(tmp_path / "model", make_model("llama", vocab_size=20_000, logit_std=1.0), make_tokenizer())
    lines = [json.dumps({"prompt": f"prompt number {index}"}) + "\n" for index in range(1500)]
    (tmp_path / "old.jsonl").write_text("".join(lines[:1400]))
    large, small = ["--memory-budget", "512MiB"], ["--memory-budget", "270MiB"]
    (tmp_path / "new.jsonl").write_text("".join(lines[::2] + lines[1::2][::-1]))
    for name, options in (("old", ["--chunk-rows", "400", *large]), ("new", [*small, "--reuse", str(tmp_path / "old")])):
        command = [sys.executable, "-m", "embstore", "build", str(tmp_path / f"{name}.jsonl"), "--model", str(model)]
        command += ["--out", str(tmp_path / name), "--json", *options]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["reused_rows"] == 1400
    assert 0 < report["peak_anonymous_bytes"] <= 270 << 20


@pytest.mark.parametrize(
    ("lines", "budget"), [(300_000, 64 << 20), pytest.param(10_000_000, 1 << 30, marks=pytest.mark.slow)]
)
def test_prompts_are_numbered_under_the_budget(lines: int, budget: int, tmp_path: Path) -> None:
    """Ids, repeats, line numbers and counts of any number of lines; the slow case takes ten minutes."""
    found = measured(lines, budget, tmp_path)
    assert found["rows"] == lines
    assert 0 < found["peak_anonymous_bytes"] <= budget
    assert found["table_peak_bytes"] <= budget


# a process of its own, as above
_GREEDY = """
import sys, time
from pathlib import Path
import numpy as np
from embstore.flow import build
from tests.support.stores import build_small

folder, size = Path(sys.argv[1]), int(sys.argv[2])
commit_prompts = build.commit_prompts

def greedy(*given, **options):
    held = np.ones(size // 8)
    time.sleep(0.5)  # ten samples of the meter
    assert held[0] == 1
    return commit_prompts(*given, **options)

build.commit_prompts = greedy
report = build_small(folder / "prompts.jsonl", folder / "store")
print(report.peak_anonymous_bytes, report.model_peak_bytes)
"""


def test_what_stage_0_takes_is_reported(tmp_path: Path) -> None:
    """The budget is for everything besides imports and the model; the report was blind before the rows."""
    size = 96 << 20
    write_small_prompts(tmp_path / "prompts.jsonl")
    result = subprocess.run(
        [sys.executable, "-c", _GREEDY, tmp_path, str(size)], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    peak, model_peak = map(int, result.stdout.split())
    assert peak > 0.9 * size
    assert model_peak < size / 2


_SEARCH = """
import sys
from pathlib import Path
import numpy as np
from embstore.search.exact import scan  # what imports take is not the search's
from embstore.search.hnsw import shards  # what imports take is not the search's
from embstore.search.graph import build_graph
from embstore.core.config import DensityConfig
from embstore.core.events import ignore
from embstore.host.memory import MemoryMeter

work, knn, ef, budget = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
coord_NR = np.load(work / "coordinates.npy", mmap_mode="r")
failed_N = np.zeros(len(coord_NR), dtype=np.bool_)
with MemoryMeter() as meter:
    meter.set_baseline()
    graph = build_graph(
        coord_NR, failed_N, DensityConfig(knn=knn, ef=ef), threads=2, memory_bytes=budget, work=work, observer=ignore,
    )
    print(graph.method, graph.shards, graph.meets_target, meter.peak_anonymous_bytes)
"""


@pytest.mark.skipif(read_memory() is None, reason="the kernel does not tell anonymous memory (not Linux)")
@pytest.mark.parametrize(
    ("knn", "ef", "method", "shards", "rows"),
    [
        ("exact", 64, "exact", 0, 30_000),
        ("hnsw", 256, "hnsw", 4, 60_000),
        # graphs of the default effort miss the target here, and the exact engine follows in the same process
        pytest.param("hnsw", 64, "exact", 0, 60_000, marks=pytest.mark.slow),
    ],
)
def test_a_search_stays_under_its_budget(knn: str, ef: int, method: str, shards: int, rows: int, tmp_path: Path) -> None:
    # with memory as it likes the exact search takes about 160 MiB (larger tiles), and HNSW two graphs
    budget = 144 << 20
    random = np.random.default_rng(0)
    centre_CR = 2 * random.standard_normal((50, 256))
    points = centre_CR[random.integers(0, 50, rows)] + 0.5 * random.standard_normal((rows, 256))
    np.save(tmp_path / "coordinates.npy", points.astype(np.float32))
    command = [sys.executable, "-c", _SEARCH, str(tmp_path), knn, str(ef), str(budget)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found, num_shards, meets_target, peak = result.stdout.split()
    assert (found, meets_target) == (method, "True")
    assert int(num_shards) >= shards
    assert 0 < int(peak) <= budget
