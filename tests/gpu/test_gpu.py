"""On a CUDA device: rows against the float64 oracle and the CPU's, the same bytes again, memory that runs out, kills.

Tiny models of real classes; tolerances are those that tests/oracle has for the CPU, unless a comment says why not.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig
from embstore.core.errors import ModelError
from embstore.core.events import Event, Observer, RowsCommitted, ignore
from embstore.core.interfaces import RowBlock
from embstore.core.prompts import Prompt
from embstore.core.records import WindowRecord
from embstore.core.spec import EmbeddingSpec, ModelIdentity
from embstore.flow.build import build
from embstore.model.embed import LogitEmbedder
from embstore.model.locate import locate_model
from embstore.model.source import TorchSource
from embstore.search.exact.scan import all_neighbors
from embstore.storage.journal import read_journal
from embstore.storage.reader import open_store
from embstore.views.info import inspect, verify
from tests.support.models import (
    PROMPTS,
    VOCABULARY,
    distances,
    embed,
    make_model,
    make_prompts,
    make_tokenizer,
    open_embedder,
    oracle_logits,
    reopened,
    rows_before_rounding,
    save_model,
    unit_mean,
)
from tests.support.stores import snapshot, write_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"),
]

DEVICE = "cuda"
HEADS = {"llama": "affine", "granite": "affine", "gemma2": "capped", "modernbert-decoder": "streamed"}
# Rows of these share one direction (a bias), as rows of trained models do; others spread ten times as far, and so do errors.
BIASED = ("phi", "modernbert-decoder")
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Folder and CPU model of a class, made once."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> tuple[Path, Any]:
        model = make_model(name)
        return save_model(root / name, model, make_tokenizer()), model

    return functools.cache(make)


@pytest.fixture(scope="module")
def expected_of(model_of: Callable[[str], tuple[Path, Any]]) -> Callable[[str], NDArray[np.float64]]:
    """Rows [N, V] in float64 on the CPU, by the unmodified class."""
    tokenizer = make_tokenizer()

    def rows(name: str) -> NDArray[np.float64]:
        logits = oracle_logits(model_of(name)[1], [tokenizer(prompt.text).input_ids for prompt in PROMPTS])
        return np.stack([unit_mean(logits_TV) for logits_TV in logits])

    return functools.cache(rows)


@pytest.fixture
def on_device(model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> Callable[..., LogitEmbedder]:
    """A new embedder on the device."""

    def make(name: str, **settings: Any) -> LogitEmbedder:
        return open_embedder(model_of(name)[0], PROMPTS, tmp_path / "work", device=DEVICE, **settings)

    return make


def copies(blocks: Iterator[RowBlock]) -> list[tuple[NDArray[Any], ...]]:
    """What blocks hold, taken before their memory may be used again."""
    return [(block.emb_BV.copy(), block.coord_BR.copy(), block.residual_B.copy()) for block in blocks]


def whole_window(embedder: LogitEmbedder, prompts: list[Prompt] = PROMPTS) -> list[tuple[NDArray[Any], ...]]:
    return copies(embedder.embed(prompts, first_row=0, chunk_rows=10, check=lambda: None))


def assert_same_bytes(left: list[tuple[NDArray[Any], ...]], right: list[tuple[NDArray[Any], ...]]) -> None:
    for one, other in zip(left, right, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_float32_rows_are_the_float64_mean_of_full_logits(
    name: str,
    on_device: Callable[..., LogitEmbedder],
    expected_of: Callable[[str], NDArray[np.float64]],
    record_property: Record,
) -> None:
    embedder = on_device(name)
    assert (embedder.spec.device, embedder.spec.dtype, embedder.spec.head.kind) == (DEVICE, "float32", HEADS[name])
    error = distances(rows_before_rounding(embedder, PROMPTS), expected_of(name)).max()
    record_property("row_error", float(error))
    assert error <= 5e-6
    stored_NV = np.concatenate([rows for rows, _, _ in whole_window(embedder)]).astype(np.float64)
    assert distances(stored_NV, expected_of(name)).max() <= 3e-4  # float16


def test_tf32_is_not_used_and_would_be_seen(
    on_device: Callable[..., LogitEmbedder], expected_of: Callable[[str], NDArray[np.float64]], record_property: Record
) -> None:
    embedder = on_device("llama")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        error = distances(rows_before_rounding(embedder, PROMPTS), expected_of("llama")).max()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    record_property("tf32_row_error", float(error))
    if torch.cuda.get_device_capability() >= (8, 0):
        assert error > 5e-6


def test_a_build_has_the_same_bytes_in_a_process_that_uses_tf32(
    model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    """Also float32 sums of 16-bit products, and cuDNN's TF32; all of it is put back."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt.text} for prompt in PROMPTS])
    embedding = EmbeddingConfig(model=str(model_of("llama")[0]), device=DEVICE, dtype="float32")
    config = BuildConfig(embedding=embedding, density=DensityConfig(knn="exact"))
    build(prompts, out=tmp_path / "plain", config=config)
    matmul: Any = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("medium")
    matmul.allow_bf16_reduced_precision_reduction = True
    try:
        build(prompts, out=tmp_path / "disturbed", config=config)
        assert torch.get_float32_matmul_precision() == "medium"
        assert matmul.allow_tf32
        assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision("highest")
    assert snapshot(tmp_path / "disturbed") == snapshot(tmp_path / "plain")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("current", [0, 1])
def test_every_gpu_gives_the_same_bytes_whatever_the_processes_current_one(
    current: int, model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    prompts = write_lines(
        tmp_path / "prompts.jsonl", [{"prompt": f"{prompt.text} {n}"} for prompt in PROMPTS for n in range(40)]
    )
    torch.cuda.set_device(current)
    try:
        for device in ("cuda", "cuda:0", "cuda:1"):
            embedding = EmbeddingConfig(model=str(model_of("llama")[0]), device=device, dtype="float32", window_rows=64)
            config = BuildConfig(embedding=embedding, density=DensityConfig(knn="exact"))
            build(prompts, out=tmp_path / device, config=config)
            assert snapshot(tmp_path / device) == snapshot(tmp_path / "cuda")
    finally:
        torch.cuda.set_device(0)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_hidden_rows_of_an_encoder_are_pooled_float64_states(pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        pad_token_id=1,
    )
    model = transformers.AutoModelForMaskedLM.from_config(config).eval().requires_grad_(False)
    tokenizer = make_tokenizer()
    folder = save_model(tmp_path / "model", model, tokenizer)
    embedder = open_embedder(folder, PROMPTS, tmp_path / "work", device=DEVICE, space="hidden", pooling=pooling)
    assert (embedder.spec.head.kind, embedder.spec.dimension) == ("none", 32)
    double = transformers.AutoModel.from_pretrained(folder).eval().double()
    with torch.inference_mode():
        states = [
            double(input_ids=torch.tensor([tokenizer(prompt.text).input_ids])).last_hidden_state[0].numpy()
            for prompt in PROMPTS
        ]
    expected_ND = np.stack([unit_mean(state_TD if pooling == "mean" else state_TD[-1:]) for state_TD in states])
    assert distances(rows_before_rounding(embedder, PROMPTS), expected_ND).max() <= 5e-6


@pytest.mark.parametrize("name", HEADS)
def test_the_device_gives_the_rows_that_the_cpu_gives(
    name: str,
    on_device: Callable[..., LogitEmbedder],
    model_of: Callable[[str], tuple[Path, Any]],
    tmp_path: Path,
    record_property: Record,
) -> None:
    on_cpu = open_embedder(model_of(name)[0], PROMPTS, tmp_path / "cpu")
    difference = distances(rows_before_rounding(on_device(name), PROMPTS), rows_before_rounding(on_cpu, PROMPTS)).max()
    record_property("difference", float(difference))
    assert difference <= 5e-6


@pytest.mark.parametrize("name", BIASED)
def test_batch_mates_hardly_move_a_bfloat16_row(
    name: str,
    on_device: Callable[..., LogitEmbedder],
    expected_of: Callable[[str], NDArray[np.float64]],
    record_property: Record,
) -> None:
    embedder = on_device(name, dtype="bfloat16")
    assert embedder.spec.dtype == "bfloat16"
    together_NV = rows_before_rounding(embedder, PROMPTS)
    error = distances(together_NV, expected_of(name)).max()
    record_property("bfloat16_row_error", float(error))
    assert 1e-5 < error < 1e-2  # it did run in bfloat16
    moved = [
        distances(rows_before_rounding(embedder, [PROMPTS[row]])[0], together_NV[row]) for row in range(0, len(PROMPTS), 4)
    ]
    record_property("moved_by_batch_mates", float(max(moved)))
    assert max(moved) <= 5e-4


def test_batch_mates_do_not_move_a_float32_row(on_device: Callable[..., LogitEmbedder]) -> None:
    embedder = on_device("llama")
    together_NV = rows_before_rounding(embedder, PROMPTS)
    for row in range(0, len(PROMPTS), 4):
        assert distances(rows_before_rounding(embedder, [PROMPTS[row]])[0], together_NV[row]) <= 2e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HEADS)
def test_the_same_embedder_and_a_reopened_one_give_the_same_bytes(
    name: str, dtype: str, on_device: Callable[..., LogitEmbedder], model_of: Callable[[str], tuple[Path, Any]]
) -> None:
    embedder = on_device(name, dtype=dtype, batch_tokens=64)  # several batches in flight
    first = whole_window(embedder)
    assert_same_bytes(whole_window(embedder), first)
    assert_same_bytes(whole_window(reopened(model_of(name)[0], embedder)), first)


def test_rows_arrive_in_pinned_memory(on_device: Callable[..., LogitEmbedder]) -> None:
    """Only then does a copy from the device run beside its products."""
    for block in embed(on_device("llama"), PROMPTS):
        assert torch.from_numpy(block.emb_BV).is_pinned()


def test_a_chunk_of_several_slabs_has_every_row_in_its_place(
    model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    """Slabs are copied on more than one stream: none may be read before it is there, or land on another one."""
    prompts = make_prompts(1500)
    rows = []
    for device in (DEVICE, "cpu"):
        embedder = open_embedder(model_of("llama")[0], prompts, tmp_path / device, device=device, batch_tokens=1024)
        blocks = embedder.embed(prompts, first_row=0, chunk_rows=400, check=lambda: None)
        rows.append(np.concatenate([block.emb_BV.astype(np.float64) for block in blocks]))
    assert distances(*rows).max() <= 3e-4


# --- memory that runs out ---------------------------------------------------------------------------------------------

_MIB = 1 << 20
_SHORT_ROWS, _WINDOW_ROWS = 96, 32


@dataclasses.dataclass
class CappedSource:
    """A source whose embedders get ``free_bytes`` of device memory beside their model, workspaces of cuBLAS included."""

    genuine: TorchSource
    free_bytes: int

    def identity(self, observer: Observer = ignore) -> ModelIdentity:
        return self.genuine.identity(observer)

    def device(self, name: str) -> str:
        return self.genuine.device(name)

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        return self.genuine.hardware(config)

    def create(self, *args: Any, **options: Any) -> LogitEmbedder:
        return self._capped(self.genuine.create(*args, **options))

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], **options: Any) -> LogitEmbedder:
        return self._capped(self.genuine.reopen(spec, basis_VR, **options))

    def _capped(self, embedder: LogitEmbedder) -> LogitEmbedder:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + self.free_bytes) / total)
        return embedder


@pytest.fixture
def memory_limits() -> Iterator[None]:
    """Whatever a test sets is lifted afterwards."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose activations take 192 KiB a token, and prompts of 240 tokens; the last one has 4000."""
    root = tmp_path_factory.mktemp("wide")
    tokenizer, random = make_tokenizer(), np.random.default_rng(0)
    model = make_model("llama", intermediate_size=16384, num_hidden_layers=1, max_position_embeddings=4096)
    folder = save_model(root / "model", model, tokenizer)
    words = [f" {chr(letter)}" for letter in range(ord("A"), ord("Z") + 1)]
    texts = ["~" + "".join(random.choice(words, size=120)) for _ in range(_SHORT_ROWS)]
    assert len({len(tokenizer(text).input_ids) for text in texts}) == 1  # so that they fill batches in any order
    lines = [{"prompt": text} for text in [*texts, "~ " * 3000]]
    return folder, write_lines(root / "prompts.jsonl", lines)


def wide_config(folder: Path) -> BuildConfig:
    embedding = EmbeddingConfig(
        model=str(folder), device=DEVICE, dtype="float32", threads=2, max_tokens=4000,
        batch_tokens=8192, window_rows=_WINDOW_ROWS, chunk_rows=16,
    )  # fmt: skip
    return BuildConfig(embedding=embedding, density=DensityConfig(knn="exact"))


def windows_of(store: Path) -> list[WindowRecord]:
    return [window for _, window in sorted(read_journal(store).windows.items())]


def committed_starts(events: list[Event]) -> list[int]:
    return [event.start for event in events if isinstance(event, RowsCommitted)]


@pytest.mark.usefixtures("memory_limits")
def test_batches_that_do_not_fit_are_split_and_a_prompt_that_cannot_fit_loses_nothing_committed(
    wide: tuple[Path, Path], tmp_path: Path, record_property: Record
) -> None:
    """8192 tokens need 1.5 GiB, 2048 need 384 MiB, the last prompt alone 750 MiB; 640 MiB are free."""
    folder, prompts = wide
    config = wide_config(folder)
    build(prompts, out=tmp_path / "uncapped", config=config)
    assert sum(window.splits for window in windows_of(tmp_path / "uncapped")) == 0

    store, events = tmp_path / "store", list[Event]()
    source = CappedSource(genuine=TorchSource(locate_model(config.embedding)), free_bytes=640 * _MIB)
    with pytest.raises(ModelError, match="does not fit the device's memory"):
        build(prompts, out=store, config=config, source=source)
    kept = windows_of(store)
    record_property("splits", [window.splits for window in kept])
    assert [window.start for window in kept] == [0, 32, 64]  # the prompt that cannot fit is in the fourth
    assert min(window.splits for window in kept) > 0
    assert not inspect(store).is_complete
    assert verify(store).findings == []

    torch.cuda.set_per_process_memory_fraction(1.0)
    build(prompts, out=store, config=config, resume=True, observer=events.append)
    assert committed_starts(events) == [96]
    assert windows_of(store)[:3] == kept
    assert (windows_of(store)[3].splits, read_journal(store).voids_identity) == (0, True)
    assert inspect(store).is_complete
    assert verify(store).findings == []
    found, expected = (
        np.concatenate([rows for _, rows in open_store(path).iter_rows()]).astype(np.float64)
        for path in (store, tmp_path / "uncapped")
    )
    assert distances(found, expected).max() <= 3e-4  # float16


@pytest.mark.usefixtures("memory_limits")
def test_a_whole_build_finishes_in_little_memory(wide: tuple[Path, Path], tmp_path: Path) -> None:
    folder, prompts = wide
    short = write_lines(tmp_path / "short.jsonl", [line.encode() for line in prompts.read_text().splitlines(True)[:-1]])
    config = wide_config(folder)
    source = CappedSource(genuine=TorchSource(locate_model(config.embedding)), free_bytes=640 * _MIB)
    report = build(short, out=tmp_path / "store", config=config, source=source)
    assert report.embedded_rows == _SHORT_ROWS
    assert min(window.splits for window in windows_of(tmp_path / "store")) > 0
    assert inspect(tmp_path / "store").is_complete
    assert verify(tmp_path / "store").findings == []


# --- kills ------------------------------------------------------------------------------------------------------------

_CHILD = """
import sys
from pathlib import Path
from embstore.flow.build import build
from tests.gpu.test_gpu import kill_config


def say(event):
    print(type(event).__name__, flush=True)


build(sys.argv[2], out=sys.argv[3], config=kill_config(Path(sys.argv[1])), observer=say)
"""


def kill_config(folder: Path) -> BuildConfig:
    """Many small windows: a kill lands in the middle of one, with the next one under way."""
    embedding = EmbeddingConfig(
        model=str(folder), device=DEVICE, dtype="bfloat16", threads=2, batch_tokens=512, window_rows=32, chunk_rows=16
    )
    return BuildConfig(embedding=embedding, density=DensityConfig(knn="exact"))


def test_a_killed_build_ends_as_if_nobody_had_killed_it(model_of: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    folder = model_of("llama")[0]
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt.text} for prompt in make_prompts(2000)])
    build(prompts, out=tmp_path / "whole", config=kill_config(folder))
    store = tmp_path / "killed"
    command = [sys.executable, "-c", _CHILD, str(folder), str(prompts), str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        seen = 0
        for line in child.stdout:
            seen += line.strip() == "RowsCommitted"
            if seen == 5:
                child.kill()
                break
    assert child.returncode == -signal.SIGKILL
    kept = windows_of(store)
    assert 5 <= len(kept) < len(windows_of(tmp_path / "whole"))
    events: list[Event] = []
    build(prompts, out=store, config=kill_config(folder), resume=True, observer=events.append)
    assert committed_starts(events) == [window.start for window in windows_of(store)[len(kept) :]]
    assert snapshot(store) == snapshot(tmp_path / "whole")
    assert verify(store).findings == []


def test_the_exact_engine_finds_on_the_gpu_what_it_finds_on_the_cpu(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    points = random.standard_normal((20_000, 96)).astype(np.float32)
    points[:4000] = 1e-3 * points[:4000] + 2  # near-copies that no tile can tell apart
    points -= points.mean(axis=0)
    found = []
    for name in ("cpu", DEVICE):
        ids_GK, distances_GK = np.empty((20_000, 32), dtype=np.int32), np.empty((20_000, 32))
        blocks = all_neighbors(points, 32, threads=2, memory_bytes=1 << 30, work=tmp_path, device=torch.device(name))
        for block in blocks:
            ids_GK[block.nodes_N], distances_GK[block.nodes_N] = block.ids_NK, block.distances_NK
        found.append((ids_GK.tobytes(), distances_GK.tobytes()))
    assert found[0] == found[1]
