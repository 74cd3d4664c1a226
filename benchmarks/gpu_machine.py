"""What products, copies, the disk and the compressor reach on this machine: the part machine of ``benchmarks.gpu``.

Shapes: B rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.acceptance import cpu_name
from benchmarks.gpu_run import DEVICE, Figures, Run
from embstore.flow.cost import CHUNK_BYTES
from embstore.host.threads import num_cores
from embstore.storage.chunks import encode_chunk
from embstore.storage.filesystem import file_system

_Event: Any = torch.cuda.Event  # torch leaves it untyped


def machine(run: Run) -> Figures:
    """What products, copies, the disk and the compressor reach here."""
    properties = torch.cuda.get_device_properties(0)
    work: Path = run.options.work
    found: Figures = {
        "device": properties.name,
        "device_bytes": properties.total_memory,
        "cpu": cpu_name(),
        "cores": num_cores(),
        "file_system": file_system(work),
        "bfloat16_flops": _product_flops(8192, 8192, 8192, torch.bfloat16),
        "float32_flops": _product_flops(8192, 8192, 8192, torch.float32),
        # one slab of rows under the large model's head
        "float32_head_flops": _product_flops(160, 128256, 2048, torch.float32),
    }
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32_head_flops"] = _product_flops(160, 128256, 2048, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    on_device = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    for name, pinned in (("pinned", True), ("pageable", False)):
        host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=pinned)
        found[f"{name}_to_host_bytes_per_second"] = _rate(len(host), functools.partial(host.copy_, on_device))
        found[f"{name}_to_device_bytes_per_second"] = _rate(len(host), functools.partial(on_device.copy_, host))
    started = time.perf_counter()
    torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    found["seconds_to_pin_a_chunk"] = time.perf_counter() - started
    rows_BV = (np.random.default_rng(0).standard_normal((112, 128256)) / 358).astype(np.float16)
    for threads in (1, 2, 4, 8):
        found[f"encode_{threads}_bytes_per_second"] = _encode_rate(rows_BV, threads)
    for writers in (1, 4):
        found[f"durable_write_{writers}_bytes_per_second"] = _write_rate(work / "raw", writers)
    return found


def _product_flops(rows: int, columns: int, inner: int, dtype: torch.dtype) -> float:
    left = torch.randn(rows, inner, dtype=dtype, device=DEVICE)
    right = torch.randn(columns, inner, dtype=dtype, device=DEVICE)
    seconds = _device_seconds(lambda: torch.nn.functional.linear(left, right))
    return 2 * rows * columns * inner / seconds


def _rate(size: int, work: Callable[[], object]) -> float:
    return size / _device_seconds(work)


def _device_seconds(work: Callable[[], object], *, repeats: int = 12) -> float:
    """Median over single runs, by the device's clock, after three that are not counted."""
    times = []
    for _ in range(3 + repeats):
        begin, end = (_Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times[3:]))


def _encode_rate(rows_BV: NDArray[np.float16], threads: int) -> float:
    count = 6 * threads
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        for encoded in pool.map(lambda _: encode_chunk(rows_BV, chunk_rows=len(rows_BV), compressor="lz4"), range(count)):
            del encoded
        return count * rows_BV.nbytes / (time.perf_counter() - started)


def _write_rate(folder: Path, writers: int) -> float:
    """Files of a chunk's size, each synced, by so many threads."""
    folder.mkdir(parents=True)
    data, count = os.urandom(CHUNK_BYTES), 24

    def write(index: int) -> None:
        with (folder / str(index)).open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())

    with ThreadPoolExecutor(writers) as pool:
        started = time.perf_counter()
        list(pool.map(write, range(count)))
        seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return count * len(data) / seconds
