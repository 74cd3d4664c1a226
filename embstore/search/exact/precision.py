"""Sums of products in full float32 precision, whatever the process has set, for as long as a scan needs them.

The bound that proves a scan's answer (``tiles.Operand.reach``) assumes that products are added in float32. By default torch
lets cuBLAS add partial sums of bfloat16 products in bfloat16, and a process may have allowed TF32, or bfloat16 on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextlib.contextmanager
def float32_sums() -> Iterator[None]:
    """No reduced precision in matrix products of this process until the context ends; then what was set before."""
    settings = torch.backends.cuda.matmul
    found = {name: getattr(settings, name) for name in _REDUCTIONS}
    # newer versions of torch say a second thing under the same name, which must not be lost
    split = {name: getattr(settings, f"{name}_split_k", None) for name in _REDUCTIONS}
    precision = torch.get_float32_matmul_precision()
    try:
        for name in _REDUCTIONS:
            setattr(settings, name, False)
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for name in _REDUCTIONS:
            setattr(settings, name, found[name] if split[name] is None else (found[name], split[name]))
        torch.set_float32_matmul_precision(precision)
