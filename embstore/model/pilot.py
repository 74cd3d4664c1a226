"""What a new store finds out by embedding a sample before row 0: the basis, the dtype, and the time a row takes.

Shapes: N sampled rows, B rows of a window, V columns, R coordinates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from embstore.core.config import format_bytes, over_memory_budget
from embstore.core.density import NOISE_FLOOR
from embstore.core.errors import BudgetError, RowError
from embstore.core.interfaces import PromptReader, no_check
from embstore.core.rows import slices
from embstore.core.sampling import seeded_draw
from embstore.host.device import free_device_bytes
from embstore.host.scratch import map_scratch
from embstore.model.backbone import SplitModel
from embstore.model.basis import coordinate_map, factor_bytes, largest_width
from embstore.model.embed import LogitEmbedder, ModelParts
from embstore.model.finish import Finisher, make_finisher, spanning_columns
from embstore.model.heads import AffineHead
from embstore.model.range_finder import sampled_basis
from embstore.model.settings import Settings
from embstore.model.tokens import TokenRow

_TIMED_ROWS = 32
_TIMED_FLOPS = 2e11  # of the timed rows
_TIMED_TOKENS = 1024
_PRODUCT_SHARE = 0.7  # of the time of a row
_DTYPE_PROBE_K = 10
# Root mean square of what a sampled basis may lose: half of what float16 does, so that hardly a residual rises above what
# float16 alone can leave (search.stored_rerank would then read that row).
_TAIL = 1e-4


def find_basis(parts: ModelParts, settings: Settings, *, memory_bytes: int) -> NDArray[np.float32]:
    """What makes coordinates of all rows where no sample is needed for it: a map of an affine head's inputs [M, R], or I.

    Raises
    ------
    BudgetError
        The factorisation does not fit the memory of the device that computes it.
    """
    spec = settings.spec
    if not isinstance(parts.head, AffineHead):
        return np.eye(spec.dimension, dtype=np.float32)
    read_block, width = spanning_columns(parts.head, spec.dimension)
    free_bytes = free_device_bytes(parts.device)
    if free_bytes is None and factor_bytes(width) > memory_bytes:
        raise over_memory_budget(f"coordinates of {width} inputs need", factor_bytes(width), memory_bytes)
    if free_bytes is not None and factor_bytes(width) > free_bytes:
        raise BudgetError(
            f"coordinates of {width} inputs need {format_bytes(factor_bytes(width))} on {parts.device}, "
            f"which has {format_bytes(free_bytes)} free",
            hint="free some of the device's memory, or use --device cpu",
        )
    return coordinate_map(read_block, spec.dimension, width, scale=parts.head.scale)


def mean_distances(
    parts: ModelParts, settings: Settings, finisher: Finisher, sample: Sequence[TokenRow]
) -> NDArray[np.float64]:
    """Floored mean distance float64 [N] of each sampled prompt to its nearest others, as the model is settled now."""
    embedder = LogitEmbedder(parts, settings.spec, np.empty((0, 0), dtype=np.float32), finisher)
    window = embedder.pool(sample, no_check)
    unit_NV, coord_NR, _ = embedder.unit_rows(window, 0, len(sample))
    # there is no basis yet where logits are pooled
    points = (unit_NV if settings.spec.head.pools_logits else coord_NR).cpu().double()
    points = points[torch.isfinite(points).all(dim=1)]
    k = min(_DTYPE_PROBE_K, len(points) - 1)
    if k < 1:
        return np.ones(max(1, len(points)))
    # differences, not a Gram matrix: at these distances cancellation would be felt even in float64
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest = distances.topk(k, largest=False).values.numpy()
    floored: NDArray[np.float64] = np.maximum(nearest.mean(axis=1), NOISE_FLOOR)
    return floored


def note_plan(embedder: LogitEmbedder, sample: Sequence[TokenRow], window_rows: int) -> None:
    """Note what the plan of a new store needs: rows of a window, the share of prompts that are cut, and a timed estimate.

    Rows are timed where that is cheap; for a large model a product of its size is, which is what most of a row is.
    """
    mean_tokens = sum(len(row.ids_T) for row in sample) / len(sample)
    flops_per_row = 2 * embedder.model.backbone_parameters * max(1.0, mean_tokens)
    if _TIMED_ROWS * flops_per_row <= _TIMED_FLOPS:
        started = time.perf_counter()
        embedder.pool(sample[:_TIMED_ROWS], no_check)
        embedder.seconds_per_row = (time.perf_counter() - started) / len(sample[:_TIMED_ROWS])
    else:
        embedder.seconds_per_row = flops_per_row / (_PRODUCT_SHARE * _timed_rate(embedder.model))
    embedder.max_window_rows, embedder.mean_tokens = window_rows, mean_tokens
    embedder.truncated_share = sum(row.was_cut for row in sample) / len(sample)


@torch.inference_mode()
def _timed_rate(model: SplitModel) -> float:
    """Operations a second of a product of the model's size, on all cores or the GPU."""
    given = torch.ones((_TIMED_TOKENS, model.width), dtype=model.dtype, device=model.device)
    weight = torch.ones((model.inner_width, model.width), dtype=model.dtype, device=model.device)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        float(torch.nn.functional.linear(given, weight)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 2 * given.numel() * model.inner_width / min(seconds)


def largest_rank(parts: ModelParts, dimension: int) -> int:
    """Most directions of a basis that is made from a sample of rows."""
    return min(parts.model.width + 1, dimension)


def basis_of_sample(
    parts: ModelParts, settings: Settings, prompts: PromptReader, work: Path, *, memory_bytes: int
) -> NDArray[np.float32]:
    """The basis [V, R] of a sample of embedded prompts, at most four for each direction; its scratch files are gone then."""
    spec = settings.spec
    max_rank = largest_rank(parts, spec.dimension)
    affordable = memory_bytes * 3 // 4 if (free := free_device_bytes(parts.device)) is None else free // 2
    limit = min(len(prompts), 4 * max_rank, largest_width(affordable))
    order = seeded_draw(len(prompts), limit, 0)
    no_basis_VR = np.zeros((spec.dimension, 0), dtype=np.float32)
    pilot = LogitEmbedder(parts, spec, no_basis_VR, make_finisher(spec, parts.head, no_basis_VR, parts.device))
    samples: list[NDArray[np.float32]] = []
    drawn = 0

    def grown(width: int) -> list[NDArray[np.float32]]:
        nonlocal drawn
        path = work / f"pilot-{len(samples)}.npy"
        samples.append(_unit_rows(pilot, settings, prompts, np.sort(order[drawn:width]).tolist(), path))
        path.unlink()  # the map lives on; no space is taken from the rows once it is gone
        drawn = width
        if not any(len(part_MV) for part_MV in samples):
            raise RowError(
                "no sampled prompt gives a usable row",
                hint="check that the model accepts these prompts",
            )
        return samples

    return sampled_basis(grown, spec.dimension, limit=limit, max_rank=max_rank, tail=_TAIL, work=work, device=parts.device)


def _unit_rows(
    pilot: LogitEmbedder, settings: Settings, prompts: PromptReader, rows: list[int], path: Path
) -> NDArray[np.float32]:
    """Unit rows float32 [M, V] of those of the prompts that give one, in a mapped scratch file."""
    unit_MV = map_scratch(path, (len(rows), settings.spec.dimension), np.float32)
    count = 0
    for part in slices(0, len(rows), settings.window_rows):
        window = pilot.pool(pilot.tokens(prompts.sample(rows[part])), no_check)
        unit_BV, _, norm_B = pilot.unit_rows(window, 0, len(window.ok_W))
        norms = norm_B.cpu().numpy()
        chosen = unit_BV.cpu().numpy()[window.ok_W & np.isfinite(norms) & (norms > 0)]
        unit_MV[count : count + len(chosen)] = chosen
        count += len(chosen)
    return unit_MV[:count]
