"""Settings of a new store: tokens of a batch, rows of a window, the backbone's dtype; and the memory that they take.

Everything here changes bytes, so it is decided by arithmetic and capabilities, never by a clock: two builds of the same
input must pin the same spec (docs/decisions/0003).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from embstore.core.config import EmbeddingConfig, format_bytes, over_memory_budget
from embstore.core.errors import BudgetError
from embstore.core.spec import EmbeddingSpec
from embstore.host.threads import workers_for
from embstore.model.backbone import SplitModel
from embstore.model.finish import slab_bytes
from embstore.model.heads import streamed_tokens

# Padding waste falls with the window: 18.6 % at 256 rows, 6.6 % at 1024, 2.0 % at 4096 (batches of 4096 tokens, each
# as long as its longest row).
MAX_WINDOW_ROWS = 4096

# In float32. On a CPU activations still fit the cores' caches, as do those of twice as many tokens in 16 bits
# (docs/decisions/0019); an accelerator wants more work at once (docs/performance.md).
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_MIN_BATCH_TOKENS = 256
_DEVICE_MEMORY_SHARE = 4  # activations may take a quarter of an accelerator's memory
# Nominal rates for "a window is about a minute of work"; a constant, so that the window does not depend on the day's load.
_NOMINAL_FLOPS = {"cpu": 1e11, "cuda": 5e13}
_WINDOW_SECONDS = 60
_STREAMED_WINDOW_BYTES = 128 << 20  # of V-wide float32 means; two windows are under way at a time
_LEAST_CHUNK_ROWS = 16
# Weights of a backbone that stay in memory whatever their stored dtype is: below it, a cast copy costs less than reading on.
SMALL_BACKBONE_BYTES = 256 << 20
_LAP_SECONDS = 600  # of arithmetic at the nominal rates below
_LAP_FLOPS = {torch.float32: {"cpu": 2e11, "cuda": 2e13}, torch.bfloat16: {"cpu": 5e11, "cuda": 2e14}}
_KERNEL_BYTES = 160 << 20  # oneDNN's: three for each of about a hundred lengths
_FIXED_BYTES = 48 << 20  # token lists, allocator slack, thread pools


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A spec whose batches are decided, and the largest number of rows a window may have."""

    spec: EmbeddingSpec
    window_rows: int

    def changed(self, **changes: object) -> Settings:
        """The same with other fields of the spec."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **changes))  # type: ignore[arg-type]

    def needed_bytes(self, model: SplitModel) -> int:
        """Memory of a window with the smallest chunk."""
        return window_bytes(self.spec, model, chunk_rows=_LEAST_CHUNK_ROWS, window_rows=self.window_rows)


def settle_batches(
    spec: EmbeddingSpec, config: EmbeddingConfig, model: SplitModel, *, mean_tokens: float, memory_bytes: int
) -> Settings:
    """Tokens of a batch and rows of a window, as large as is useful and as the memory budget allows.

    Batches are halved until a window with the smallest chunk fits the budget; a batch that the user chose stays.

    Raises
    ------
    BudgetError
        Not even the smallest batches fit.
    """
    settings = Settings(
        spec=spec, window_rows=window_rows_of(spec, model, mean_tokens=mean_tokens, memory_bytes=memory_bytes)
    )
    dtype = config.dtype if config.dtype not in (None, "auto") else "float32"
    rank = min(model.width + 1, spec.dimension)

    def needed(tokens: int) -> int:
        return settings.changed(batch_tokens=tokens, rank=rank, dtype=dtype).needed_bytes(model)

    tokens = config.batch_tokens or _batch_tokens(model)
    while config.batch_tokens is None and tokens > _MIN_BATCH_TOKENS and needed(tokens) > memory_bytes:
        tokens //= 2
    if needed(tokens) > memory_bytes:
        raise over_memory_budget("embedding needs at least", needed(tokens), memory_bytes)
    return settings.changed(batch_tokens=tokens)


def window_rows_of(spec: EmbeddingSpec, model: SplitModel, *, mean_tokens: float, memory_bytes: int) -> int:
    """Rows of one window: 4096, about a minute of work at most, and what V-wide means allow on the streaming path."""
    minute = int(_WINDOW_SECONDS * _NOMINAL_FLOPS[spec.device] / max(1.0, 2 * model.backbone_parameters * mean_tokens))
    wide = MAX_WINDOW_ROWS
    if spec.head.pools_logits:
        wide = min(_STREAMED_WINDOW_BYTES, memory_bytes // 8) // (4 * spec.dimension)
    return max(16, min(MAX_WINDOW_ROWS, minute, wide))


def in_16_bits(settings: Settings, config: EmbeddingConfig, model: SplitModel, *, memory_bytes: int) -> Settings:
    """bfloat16, on a CPU with twice the tokens a batch, which take the same bytes, unless batches were chosen or reduced."""
    narrow = settings.changed(dtype="bfloat16")
    full = _BATCH_TOKENS["cpu"]
    wider = narrow.changed(batch_tokens=2 * full)
    is_free = narrow.spec.device == "cpu" and config.batch_tokens is None and narrow.spec.batch_tokens == full
    return wider if is_free and wider.needed_bytes(model) <= memory_bytes else narrow


def _batch_tokens(model: SplitModel) -> int:
    """Padded tokens of a batch: a constant of the device's kind, halved while activations would crowd its memory."""
    tokens = _BATCH_TOKENS[model.device.type]
    if model.device.type == "cuda":
        memory = torch.cuda.get_device_properties(model.device).total_memory // _DEVICE_MEMORY_SHARE
        while tokens > _MIN_BATCH_TOKENS and activation_bytes(tokens, model) > memory:
            tokens //= 2
    return tokens


def capacity_bytes(model: SplitModel, dtype: torch.dtype, asked_bytes: int | None) -> int | None:
    """Memory of the units that are open at a time in the layered order; None: the plain order, in which all stay.

    ``asked_bytes`` is ``--model-memory``. Without it, a backbone stays in memory where it is small, and on a GPU where it
    leaves a quarter of the free memory; any other is read unit by unit, two at a time: one computes, the next one is read.

    Raises
    ------
    BudgetError
        Less was asked for than the two largest units take.
    """
    sizes, base_bytes = _layer_sizes(model, dtype)
    whole_bytes, least_bytes = sum(sizes) + base_bytes, sum(sizes[:2]) + base_bytes
    problem = model.why_plain
    if asked_bytes is None:
        stays = problem is not None or whole_bytes <= _resident_bytes(model.device)
        return None if stays else sum(sizes[:2])
    if whole_bytes <= asked_bytes:
        return None
    if problem is None and asked_bytes >= least_bytes:
        return asked_bytes - base_bytes
    if problem is not None:
        needs, needed_bytes = f"{problem}, which takes", whole_bytes
    else:
        needs, needed_bytes = f"the two largest layers of {type(model.module).__name__} take", least_bytes
    raise BudgetError(
        f"{needs} {format_bytes(needed_bytes)} in {str(dtype).removeprefix('torch.')}, --model-memory is "
        f"{format_bytes(asked_bytes)}",
        hint=f"give --model-memory {-(-needed_bytes // (1 << 20))}MiB or more",
    )


def does_not_fit(model: SplitModel, dtype: torch.dtype, asked_bytes: int | None) -> BudgetError:
    """The refusal of weights that turned out not to fit the device, with what would."""
    sizes, base_bytes = _layer_sizes(model, dtype)
    least_bytes = sum(sizes[:2]) + base_bytes
    given = "auto" if asked_bytes is None else format_bytes(asked_bytes)
    return BudgetError(
        f"the layers of {type(model.module).__name__} do not fit the memory of {model.device} (--model-memory is {given})",
        hint=f"free memory there, or give --model-memory {-(-least_bytes // (1 << 20))}MiB, the least that works",
    )


def _layer_sizes(model: SplitModel, dtype: torch.dtype) -> tuple[list[int], int]:
    """Bytes of each unit in ``dtype``, the largest first, and of the weights that always stay."""
    weights = model.weights
    sizes = sorted((weights.bytes_of(unit, dtype) for unit in weights.parts.units), reverse=True)
    return sizes, weights.base_bytes(dtype)


def _resident_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return SMALL_BACKBONE_BYTES
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes * 3 // 4


def lap_tokens(spec: EmbeddingSpec, model: SplitModel, *, spare_bytes: int) -> int:
    """Padded tokens of a lap: what waits at the gates fits ``spare_bytes`` (a GPU's own memory), and a lap ten minutes."""
    if model.device.type == "cuda":
        spare_bytes = torch.cuda.mem_get_info(model.device)[0] // _DEVICE_MEMORY_SHARE
    waiting_bytes = model.waiting_bytes_per_token + (0 if model.is_causal else 4 * spec.max_tokens)
    flops = _LAP_FLOPS[model.dtype][model.device.type]
    in_time = _LAP_SECONDS * flops / max(1, 2 * model.backbone_parameters)
    return int(min(in_time, spare_bytes / max(1, waiting_bytes)))


def makes_kernels(spec: EmbeddingSpec) -> bool:
    """Whether oneDNN makes kernels for every number of tokens in a batch, and keeps them (docs/decisions/0015)."""
    return spec.device == "cpu" and (spec.dtype != "float32" or spec.packed_layers)


def num_workers(spec: EmbeddingSpec, model: SplitModel) -> int:
    """Batches in flight; follows from pinned values and the model, because it decides how torch splits its sums."""
    tokens = max(spec.batch_tokens, spec.max_tokens)
    if spec.device != "cpu" or model.is_stateful or boundary_of(spec, model) is not None:
        return 1
    return workers_for(spec.threads, activation_bytes(tokens, model))


def boundary_of(spec: EmbeddingSpec, model: SplitModel) -> int | None:
    """Tokens above which the class computes a whole batch differently, where a prompt may have so many."""
    limit = model.length_limit
    return limit if limit is not None and limit < spec.max_tokens else None


def activation_bytes(tokens: int, model: SplitModel) -> int:
    """Memory of one batch's activations in float32, calibrated with VmRSS - RssFile on the CPU."""
    return tokens * (12 * model.width + 4 * model.inner_width) * 4


def window_bytes(spec: EmbeddingSpec, model: SplitModel, *, chunk_rows: int, window_rows: int) -> int:
    """Upper estimate of host memory of one window: activations, pooled means, slabs in work, and chunks.

    On another device than the CPU activations are in that device's memory.
    """
    workers = num_workers(spec, model)
    tokens = max(spec.batch_tokens, spec.max_tokens)
    activations = workers * activation_bytes(tokens, model) if spec.device == "cpu" else 0
    pooled_width = spec.dimension if spec.head.pools_logits else model.width
    means = 2 * window_rows * pooled_width * 4  # of a window and the one that follows
    wide = workers * slab_bytes(spec.dimension, spec.rank)
    if spec.head.pools_logits:
        # the logits, the class's own copies while it caps them, and what is added and gathered
        wide += workers * 6 * streamed_tokens(spec.dimension) * spec.dimension * 4
    # one is being written and two wait with their encoded copies, the next one is ready and another one begun
    chunks = 8 * chunk_rows * (spec.dimension * 2 + spec.rank * 4)
    coordinates = 2 * window_rows * spec.rank * 4
    kernels = _KERNEL_BYTES if makes_kernels(spec) else 0
    return activations + means + wide + chunks + coordinates + kernels + _FIXED_BYTES
