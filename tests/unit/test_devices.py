"""One device, with its index, through a build, a resume, its threads and its search; nothing here needs a GPU."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embstore.core.config import BuildConfig, EmbeddingConfig
from embstore.core.errors import ConfigError
from embstore.core.events import Preflight
from embstore.flow.build import build
from embstore.host.device import resolve_device
from embstore.host.threads import Workers, finish_all
from embstore.model.embed import LogitEmbedder, PooledWindow
from embstore.search import graph
from embstore.search.exact.scan import scan_device
from embstore.storage.reader import open_store
from tests.support.fake import FakeSource
from tests.support.stores import build_part, build_small, with_density, with_embedding

pytestmark = pytest.mark.usefixtures("without_syncs")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sees two GPUs, whose main thread called ``torch.cuda.set_device(1)``, as a rank of torchrun does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(
    ("name", "found"),
    [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda:1"), ("auto", "cuda:1"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")],
)
def test_a_device_has_its_index(name: str, found: str, two_gpus: None) -> None:
    assert str(resolve_device(name)) == found


def test_a_gpu_that_is_not_here_is_refused_with_those_that_are(two_gpus: None) -> None:
    with pytest.raises(ConfigError, match=r"device 'cuda:2' is not available: torch sees 2 CUDA devices here") as caught:
        resolve_device("cuda:2")
    assert caught.value.hint == "use --device auto or cpu, or cuda:0 to cuda:1"


def test_without_a_gpu_auto_is_the_cpu_also_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch sees 0 CUDA devices"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_mps_is_refused_by_name_before_anything_is_read(name: str) -> None:
    for refuse in (lambda: EmbeddingConfig(device=name), lambda: resolve_device(name)):
        with pytest.raises(ConfigError, match="embstore does not compute on mps: that device has no float64") as caught:
            refuse()
        assert caught.value.hint == "use --device cpu, which auto means on a Mac"


@pytest.mark.parametrize("name", ["gpu", "xpu", "cuda:x", "cuda:", "meta", ""])
def test_other_names_are_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ConfigError, match="does not compute on device") as caught:
        EmbeddingConfig(device=name)
    assert caught.value.hint == "use auto, cpu, cuda or cuda:N"


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", {"cuda:1"}), ("cpu", set())])
def test_threads_make_the_device_their_current_one(device: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: dict[int, str] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda given: chosen.update({threading.get_ident(): str(given)}))
    workers, both_here = Workers(2, 2, torch.device(device)), threading.Barrier(2, timeout=300)
    idents: list[int] = []
    jobs = [workers.submit(lambda: (both_here.wait(), idents.append(threading.get_ident()))[1]) for _ in range(2)]
    finish_all(jobs)
    assert set(chosen.values()) == expected
    assert not expected or set(idents) == set(chosen)


def test_an_event_is_recorded_on_a_stream_of_the_embedders_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its device, ``current_stream`` is that of the thread's current GPU, where the event is ready at once."""
    asked: list[object] = []

    class Stream:
        def record_event(self) -> str:
            return "recorded"

    def current_stream(device: object = None) -> Stream:
        asked.append(device)
        return Stream()

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(LogitEmbedder, "_pool_batch", lambda self, batch, window: None)
    embedder: Any = object.__new__(LogitEmbedder)
    embedder._device = torch.device("cuda", 1)
    embedder._tokenizer = dataclasses.make_dataclass("Tokenizer", ["pad_id"])(0)
    window: Any = dataclasses.make_dataclass("Window", ["ready", "means"])(
        None, PooledWindow(mean_WX=torch.zeros(1), ok_W=np.ones(1), sequence_W=np.zeros(1, dtype=np.uint64))
    )
    row = dataclasses.make_dataclass("Row", ["ids_T", "pooled_T"])(np.array([3, 4]), np.array([True, True]))
    embedder._pool_rows(window, [row], np.array([0]), 2, lambda: None, {})
    assert asked == [torch.device("cuda", 1)]
    assert window.ready == "recorded"


def test_a_search_takes_the_gpu_with_its_index_or_the_cpu(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(scan_device("cuda")) == "cuda:1"
    assert str(scan_device("cuda:0")) == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(scan_device("cuda:0")) == "cpu"


class _Searched:
    """The devices that neighbour searches were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices: list[object] = []
        search = graph.build_graph

        def noted(*arguments: Any, **options: Any) -> Any:
            self.devices.append(options.pop("device"))
            return search(*arguments, **options, device="cpu")

        monkeypatch.setattr(graph, "build_graph", noted)


@pytest.mark.parametrize(("given", "device"), [("cuda:1", "cuda:1"), ("cuda", "cuda:0"), (None, "cpu"), ("auto", "cpu")])
def test_a_build_and_its_search_are_on_the_device_that_was_given(
    given: str | None, device: str, small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched, source, plans = _Searched(monkeypatch), FakeSource(), []
    build_small(
        small_prompts,
        tmp_path / "store",
        config=with_embedding(device=given),
        source=source,
        observer=lambda event: plans.append(event.device) if isinstance(event, Preflight) else None,
    )
    assert source.devices == searched.devices == plans == [device]
    assert open_store(tmp_path / "store").spec.embedding.device == device.partition(":")[0], "the spec has no index"


@pytest.mark.parametrize(("given", "device"), [("cuda:1", "cuda:1"), ("cuda:0", "cuda:0"), (None, "cuda:0")])
def test_a_resume_and_its_search_are_on_the_device_that_was_given(
    given: str | None, device: str, small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another GPU of the same model is no other hardware."""
    store = build_part(small_prompts, tmp_path / "store", rows=32, config=with_embedding(device="cuda:3"))
    searched, source = _Searched(monkeypatch), FakeSource()
    build_small(small_prompts, store, config=with_embedding(device=given), source=source)
    assert source.devices == searched.devices == [device]


def test_copied_and_computed_rows_are_on_the_device_that_was_given(
    small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_small(small_prompts, tmp_path / "old", config=with_embedding(device="cuda:0"))
    more = tmp_path / "more.jsonl"
    more.write_bytes(small_prompts.read_bytes() + b'{"prompt": "one more"}\n')
    searched, source = _Searched(monkeypatch), FakeSource()
    config = dataclasses.replace(with_embedding(device="cuda:1"), reuse=(str(tmp_path / "old"),))
    build_small(more, tmp_path / "store", config=config, source=source)
    assert source.devices == searched.devices == ["cuda:1"]


def test_a_finished_store_is_searched_again_where_its_gpu_is_not(
    small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model named, as on the line that built it; the search looks itself whether there is a GPU."""

    class Laptop(FakeSource):
        def device(self, name: str) -> str:
            if name.startswith("cuda"):
                raise ConfigError("torch sees 0 CUDA devices here")
            return super().device(name)

    store = tmp_path / "store"
    build_small(small_prompts, store, config=with_embedding(device="cuda:1"))
    searched = _Searched(monkeypatch)
    build_small(small_prompts, store, config=with_density(seed=5), source=Laptop())
    assert searched.devices == ["cuda"]
    config = dataclasses.replace(with_embedding(device="cuda:1"), density=with_density(seed=6).density)
    with pytest.raises(ConfigError, match="0 CUDA devices"):
        build_small(small_prompts, store, config=config, source=Laptop())


def test_a_search_alone_is_on_the_stores_kind_of_device(
    small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are committed, and no model is given."""
    store = tmp_path / "store"
    build_small(small_prompts, store, config=with_embedding(device="cuda:1"))
    searched = _Searched(monkeypatch)
    again = BuildConfig(density=dataclasses.replace(BuildConfig().density, seed=5))
    build(None, out=store, config=again, resume=True)
    asked = dataclasses.replace(again, density=dataclasses.replace(again.density, seed=6))
    build(None, out=store, config=dataclasses.replace(asked, embedding=EmbeddingConfig(device="cuda:1")), resume=True)
    assert searched.devices == ["cuda", "cuda:1"]
