"""Whether a new store's backbone runs in bfloat16: ``--dtype auto`` compares it with float32 on a few sampled prompts.

How many follows from sizes and never from a clock, because the answer changes every byte (docs/decisions/0048).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from embstore.core.diagnostics import total_variation
from embstore.core.events import Notice, Observer, stage
from embstore.host.device import has_fast_bfloat16
from embstore.model.backbone import SplitModel
from embstore.model.embed import ModelParts
from embstore.model.finish import Finisher
from embstore.model.pilot import mean_distances
from embstore.model.settings import Settings
from embstore.model.tokens import TokenRow

_MAX_TV = 1e-3
_LEAST_COMPARED, _MOST_COMPARED = 32, 256
_COMPARED_SHARE = 0.05
_FLOAT32_COST = 8  # of a row in float32, as a multiple of one in bfloat16, on a CPU with AMX
_COMPARED_FLOPS = 1e12


def takes_bfloat16(
    parts: ModelParts,
    settings: Settings,
    finisher: Finisher,
    sample: Sequence[TokenRow],
    *,
    num_rows: int,
    memory_bytes: int,
    settle: Callable[[torch.dtype], None],
    observer: Observer,
) -> bool:
    """Take bfloat16 where the hardware computes it and it moves the weights by a TV of at most 1e-3.

    ``num_rows`` is N; ``settle`` settles the model in a dtype, and leaves it in the one that was compared last.
    """
    model = parts.model
    # kernels of bfloat16 are made for every shape, and kept: where they do not fit, float32 may
    if settings.changed(dtype="bfloat16").needed_bytes(model) > memory_bytes or not has_fast_bfloat16(parts.device):
        return False
    count = compared_rows(model, num_rows, mean_tokens=sum(len(row.ids_T) for row in sample) / len(sample))
    if count == 0:
        is_stored = model.stored_dtype == torch.bfloat16
        reason = "the checkpoint's precision" if model.stored_dtype != torch.float16 else "because float16 overflows"
        observer(
            Notice(
                message=f"using {'bfloat16' if is_stored else 'float32'}, {reason}: comparing bfloat16 with float32 on "
                f"{_LEAST_COMPARED} prompts would cost more than 5 % of the pass, so nothing was compared"
            )
        )
        return is_stored
    with stage(observer, "dtype"):
        settle(torch.float32)
        exact = mean_distances(parts, settings, finisher, sample[:count])
        settle(torch.bfloat16)
        try:
            tv = total_variation(exact, mean_distances(parts, settings, finisher, sample[:count]))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            tv = math.inf  # a few classes mix precisions in a way that torch refuses
    if tv <= _MAX_TV:
        return True
    change = f"bfloat16 would change the weights by TV {tv:.1e} (limit {_MAX_TV:g}, {len(sample[:count])} sampled prompts)"
    cannot = f"{type(model.module).__name__} does not run in bfloat16"
    observer(Notice(message=f"using float32: {cannot if math.isinf(tv) else change}"))
    return False


def compared_rows(model: SplitModel, num_rows: int, *, mean_tokens: float) -> int:
    """How many sampled prompts are compared in both types; 0: even the fewest would cost too much.

    The float32 side of a comparison may take 5 % of the pass, or a few seconds whatever the pass takes.
    """
    affordable = int(num_rows * _COMPARED_SHARE / _FLOAT32_COST)
    cheap = int(_COMPARED_FLOPS / max(1.0, 2 * model.backbone_parameters * mean_tokens))
    count = min(_MOST_COMPARED, max(affordable, cheap))
    return count if count >= _LEAST_COMPARED else 0
