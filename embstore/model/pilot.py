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

from embstore.core.density import NOISE_FLOOR
from embstore.core.errors import RowError
from embstore.core.interfaces import PromptReader, no_check
from embstore.core.rows import slices
from embstore.core.sampling import seeded_sample
from embstore.host.scratch import map_scratch
from embstore.model.backbone import SplitModel
from embstore.model.basis import orthonormal_basis
from embstore.model.embed import LogitEmbedder, ModelParts
from embstore.model.finish import Finisher, identity_columns, make_finisher, spanning_columns
from embstore.model.heads import AffineHead
from embstore.model.settings import Settings
from embstore.model.tokens import TokenRow

_TIMED_ROWS = 32
_TIMED_FLOPS = 2e11  # of the timed rows
_TIMED_TOKENS = 1024
_PRODUCT_SHARE = 0.7  # of the time of a row
_DTYPE_PROBE_K = 10


def find_basis(parts: ModelParts, settings: Settings, prompts: PromptReader, work: Path) -> NDArray[np.float32]:
    """The orthonormal basis float32 [V, R] of all rows: the head's own span, or that of min(N, 4 R) embedded prompts."""
    spec = settings.spec
    max_rank = min(parts.model.width + 1, spec.dimension)
    if isinstance(parts.head, AffineHead):
        read_block, width = spanning_columns(parts.head, spec.dimension)
    elif not spec.head.pools_logits:
        read_block, width = identity_columns(spec.dimension, parts.device)
    else:
        pilot_NV = _pilot_rows(parts, settings, prompts, 4 * max_rank, work)
        width = len(pilot_NV)

        def read_block(start: int, stop: int) -> torch.Tensor:
            return torch.from_numpy(np.asarray(pilot_NV[:, start:stop])).T

    # a mapped scratch file: the basis does not count as anonymous memory
    flat = map_scratch(work / "basis.npy", (spec.dimension * min(max_rank, width),), np.float32)
    return orthonormal_basis(read_block, spec.dimension, width, max_rank=max_rank, scratch=flat)


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
    embedder.max_window_rows = window_rows
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


def _pilot_rows(
    parts: ModelParts, settings: Settings, prompts: PromptReader, wanted: int, work: Path
) -> NDArray[np.float32]:
    """Unit rows float32 [N, V] of a seeded sample, in a mapped scratch file."""
    spec = settings.spec
    rows = seeded_sample(len(prompts), wanted, 0).tolist()
    pilot_NV = map_scratch(work / "pilot.npy", (len(rows), spec.dimension), np.float32)
    no_basis_VR = np.zeros((spec.dimension, 0), dtype=np.float32)
    pilot = LogitEmbedder(parts, spec, no_basis_VR, make_finisher(spec, parts.head, no_basis_VR, parts.device))
    count = 0
    for part in slices(0, len(rows), settings.window_rows):
        window = pilot.pool(pilot.tokens(prompts.sample(rows[part])), no_check)
        unit_BV, _, norm_B = pilot.unit_rows(window, 0, len(window.ok_W))
        norms = norm_B.cpu().numpy()
        chosen = unit_BV.cpu().numpy()[window.ok_W & np.isfinite(norms) & (norms > 0)]
        pilot_NV[count : count + len(chosen)] = chosen
        count += len(chosen)
    if count == 0:
        raise RowError(
            "no sampled prompt gives a usable row",
            hint="check that the model accepts these prompts",
        )
    return pilot_NV[:count]
