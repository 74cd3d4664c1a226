"""What the caller's process has set in torch changes no byte of a build, and is as before afterwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig
from embstore.core.errors import EmbstoreError
from embstore.core.events import StageStarted
from embstore.flow.build import build
from embstore.host.numerics import exact_arithmetic, full_precision
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import snapshot, write_lines

pytestmark = pytest.mark.usefixtures("without_syncs")

_HAS_PRECISIONS = hasattr(torch._C, "_get_fp32_precision_getter")


def _state() -> dict[str, object]:
    """Everything that the settings below change, as torch tells it."""
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation")
    state: dict[str, object] = {name: getattr(matmul, name, None) for name in names}
    state |= {f"{name} split": getattr(matmul, f"{name}_split_k", None) for name in names}
    for name in ("flash", "mem_efficient", "math", "cudnn"):
        state[name] = getattr(backends.cuda, f"{name}_sdp_enabled")()
    for read in (torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32, lambda: matmul.allow_tf32):
        try:
            state[f"tf32 {len(state)}"] = read()
        except RuntimeError as error:  # a mixture of two interfaces, which must be the same mixture afterwards
            state[f"tf32 {len(state)}"] = str(error)
    if _HAS_PRECISIONS:
        for backend, operator in (("generic", "all"), ("cuda", "all"), ("mkldnn", "all")):
            state[backend] = torch._C._get_fp32_precision_getter(backend, operator)
        for backend in ("cuda", "mkldnn"):
            for operator in ("matmul", "conv", "rnn"):
                state[f"{backend} {operator}"] = torch._C._get_fp32_precision_getter(backend, operator)
    return state | {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "inference": torch.is_inference_mode_enabled(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "mkldnn": (backends.mkldnn.enabled, backends.mkldnn.deterministic),
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def _changed(read: Callable[[], Any], write: Callable[[Any], object], value: object) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def _precision(backend: str, operator: str, value: str) -> Iterator[None]:
    before = torch._C._get_fp32_precision_getter(backend, operator)
    torch._C._set_fp32_precision_setter(backend, operator, value)
    try:
        yield
    finally:
        torch._C._set_fp32_precision_setter(backend, operator, before)


def _matmul(value: str) -> contextlib.AbstractContextManager[None]:
    return _changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


@contextlib.contextmanager
def _default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def _of(module: Any, name: str, value: object) -> contextlib.AbstractContextManager[None]:
    return _changed(lambda: getattr(module, name), lambda given: setattr(module, name, given), value)


DISTURBED: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "medium": lambda: _matmul("medium"),
    "high": lambda: _matmul("high"),
    "float64": lambda: _changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: _changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default device": lambda: _default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "one thread": lambda: _changed(torch.get_num_threads, torch.set_num_threads, 1),
    "five threads": lambda: _changed(torch.get_num_threads, torch.set_num_threads, 5),
    "deterministic": lambda: _changed(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 1),
    "no flash attention": lambda: _changed(
        torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False
    ),
    "no mkldnn": lambda: _of(torch.backends.mkldnn, "enabled", False),
    "cudnn benchmark": lambda: _of(torch.backends.cudnn, "benchmark", True),
    "reductions": lambda: _of(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
}
if _HAS_PRECISIONS:
    DISTURBED |= {
        "generic precision": lambda: _precision("generic", "all", "bf16"),
        "mkldnn precision": lambda: _precision("mkldnn", "matmul", "bf16"),
        "cudnn precision": lambda: _precision("cuda", "conv", "ieee"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", make_model("llama"), make_tokenizer())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines: list[dict[str, object]] = [{"prompt": f"the sum of {number} and " * (1 + number % 5)} for number in range(40)]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", lines)


def _config(folder: Path) -> BuildConfig:
    embedding = EmbeddingConfig(model=str(folder), device="cpu", threads=2, dtype="float32")
    return BuildConfig(embedding=embedding, density=DensityConfig(knn="exact"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    build(prompts, out=store, config=_config(folder))
    return snapshot(store)


@pytest.mark.parametrize("name", DISTURBED)
def test_a_build_has_the_same_bytes_whatever_its_process_has_set(
    name: str, folder: Path, prompts: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    with DISTURBED[name]():
        before = _state()
        build(prompts, out=tmp_path / "store", config=_config(folder))
        assert _state() == before
    assert snapshot(tmp_path / "store") == undisturbed


@pytest.mark.parametrize("name", DISTURBED)
def test_settings_are_put_back_after_an_error(name: str) -> None:
    plain = _state()
    with DISTURBED[name]():
        before = _state()
        assert name in ("reductions", "one thread") or before != plain, "the case changes nothing that is looked at"
        with pytest.raises(KeyError):
            _fail_exactly()
        assert _state() == before


def _fail_exactly() -> None:
    with exact_arithmetic():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        assert torch.zeros(1).dtype == torch.float32
        assert torch.zeros(1).device == torch.device("cpu")
        assert torch.backends.mkldnn.enabled
        assert not torch.is_autocast_enabled("cpu")
        torch.set_num_threads(3)
        raise KeyError


def test_a_build_that_fails_puts_its_settings_back(folder: Path, prompts: Path, tmp_path: Path) -> None:
    config = BuildConfig(embedding=EmbeddingConfig(model=str(folder), device="cpu", threads=2), memory_budget_bytes=1 << 20)
    with _matmul("medium"), _changed(torch.get_num_threads, torch.set_num_threads, 1):
        before = _state()
        with pytest.raises(EmbstoreError):
            build(prompts, out=tmp_path / "store", config=config)
        assert _state() == before


def test_the_last_of_two_builds_puts_the_settings_back() -> None:
    """In two threads, one begins before and ends before the other: neither loses its precision nor keeps it."""
    first_left, second_is_in, seen = threading.Event(), threading.Event(), list[str]()

    def second() -> None:
        with exact_arithmetic():
            second_is_in.set()
            assert first_left.wait(timeout=300)
            seen.append(torch.get_float32_matmul_precision())

    with _matmul("medium"):
        before = _state()
        thread = threading.Thread(target=second)
        with exact_arithmetic():
            thread.start()
            assert second_is_in.wait(timeout=300)
        first_left.set()
        thread.join()
        assert seen == ["highest"]
        assert _state() == before


def test_threads_of_a_build_see_full_precision(folder: Path, prompts: Path, tmp_path: Path) -> None:
    """What is thread-local is torch's own in a new thread; what is not, the build has set."""
    seen = []

    def look(event: object) -> None:
        if isinstance(event, StageStarted) and event.stage == "embed":
            thread = threading.Thread(target=lambda: seen.append(_state()))
            thread.start()
            thread.join()

    with _matmul("medium"), torch.autocast("cpu", dtype=torch.bfloat16), _default_device("meta"):
        build(prompts, out=tmp_path / "store", config=_config(folder), observer=look)
    assert [state["dtype"] for state in seen] == [torch.float32]
    assert seen[0]["autocast"] == (False, False)
    assert seen[0]["device"] == torch.device("cpu")
    assert "highest" in seen[0].values()


def test_the_part_of_the_process_may_be_left_in_any_order() -> None:
    """As workers in one thread are closed: the first one first."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with contextlib.ExitStack() as first:
            first.enter_context(full_precision())
            second = contextlib.ExitStack()
            second.enter_context(full_precision())
        assert torch.get_float32_matmul_precision() == "highest"
        second.close()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.is_grad_enabled()
    finally:
        torch.set_float32_matmul_precision(before)
