"""What one window takes on the host, by arithmetic: the memory budget, the preflight and the number of workers go by it."""

from __future__ import annotations

from embstore.core.spec import EmbeddingSpec
from embstore.host.threads import workers_for
from embstore.model.finish import slab_bytes
from embstore.model.heads import streamed_tokens

# Padding waste falls with the window: 18.6 % at 256 rows, 6.6 % at 1024, 2.0 % at 4096 (batches of 4096 tokens, each
# as long as its longest row).
MAX_WINDOW_ROWS = 4096


def is_streamed(spec: EmbeddingSpec) -> bool:
    """Whether what is pooled is logits, V wide, because the head is not affine."""
    return spec.head in ("streamed", "capped")


def makes_kernels(spec: EmbeddingSpec) -> bool:
    """Whether oneDNN makes kernels for every number of tokens in a batch, and keeps them."""
    return spec.device == "cpu" and (spec.dtype != "float32" or spec.has_packed_layers)


def num_workers(spec: EmbeddingSpec, width: int, inner_width: int) -> int:
    """Batches in flight; follows from pinned values and the model, because it decides how torch splits its sums."""
    tokens = max(spec.batch_tokens, spec.max_tokens)
    return workers_for(spec.threads, activation_bytes(tokens, width, inner_width)) if spec.device == "cpu" else 1


def activation_bytes(tokens: int, width: int, inner_width: int) -> int:
    """Of one batch in float32, calibrated with VmRSS - RssFile on the CPU."""
    return tokens * (12 * width + 4 * inner_width) * 4


def window_bytes(spec: EmbeddingSpec, width: int, inner_width: int, chunk_rows: int, window_rows: int) -> int:
    """Upper estimate of host memory of one window: activations, pooled means, slabs in work, and chunks.

    On another device than the CPU activations live there.
    """
    workers = num_workers(spec, width, inner_width)
    tokens = max(spec.batch_tokens, spec.max_tokens)
    activations = workers * activation_bytes(tokens, width, inner_width) if spec.device == "cpu" else 0
    pooled_width = spec.dimension if is_streamed(spec) else width
    means = 2 * window_rows * pooled_width * 4  # of a window and the one that follows
    wide = workers * slab_bytes(spec.dimension, spec.rank)
    if is_streamed(spec):
        # the logits, the class's own copies while it caps them, and what is added and gathered
        wide += workers * 6 * streamed_tokens(spec.dimension) * spec.dimension * 4
    # one is being written and two wait with their encoded copies, the next one is ready and another one begun
    chunks = 8 * chunk_rows * (spec.dimension * 2 + spec.rank * 4)
    coordinates = 2 * window_rows * spec.rank * 4
    kernels = _KERNEL_BYTES if makes_kernels(spec) else 0
    return activations + means + wide + chunks + coordinates + kernels + _FIXED_BYTES


_KERNEL_BYTES = 160 << 20  # oneDNN's: three for each of about a hundred lengths
_FIXED_BYTES = 48 << 20  # token lists, allocator slack, thread pools
