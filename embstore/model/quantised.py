"""Quantised checkpoints: 8-bit floats and MXFP4 become bfloat16 as they are read, any other method is refused by name.

A kernel for quantised weights rounds activations too, and differently on each device; rows are of the weights alone. So the
tensors are multiplied with their scales, one at a time, and the class is loaded as a plain bfloat16 model.

Shapes: R rows, C columns of a matrix; r and c those of its grid of scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embstore.core.errors import ModelError
from embstore.host.allocator import give_back
from embstore.model.spilled import spilled

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the values of a 4-bit float; the highest bit is the sign
_EIGHT_BITS = tuple(
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz") if hasattr(torch, name)
)
_ROWS_AT_A_TIME = 1 << 14
_PLAIN = "give the checkpoint from which it was quantised, in bfloat16 or float16"


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quantisation that ``config.json`` names, also for the text part of a multimodal model; None for plain weights."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(settings, Mapping):
            is_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
            return "bitsandbytes" if is_bits else str(settings.get("quant_method") or "unknown")
    return None


def refuse_other_methods(config: Mapping[str, Any], name: str) -> None:
    """Refuse quantisations whose weights cannot be turned into plain ones here.

    Raises
    ------
    ModelError
        It names the method, and what to use in its place.
    """
    method = method_of(config)
    if method in (None, "fp8", "mxfp4"):
        return
    if method == "compressed-tensors" and _compressed(config) == "float-quantized":
        return
    shown = f"{method} ({_compressed(config)})" if method == "compressed-tensors" else method
    raise ModelError(f"{name} is quantised with {shown}, which embstore does not compute", hint=_PLAIN)


def plain_tensors(
    tensors: dict[str, Tensor], config: Mapping[str, Any], name: str, scratch: Path | None = None
) -> dict[str, Tensor]:
    """The tensors with quantised ones as bfloat16, in scratch files, and without their scales.

    Raises
    ------
    ModelError
        A quantised tensor has no scales, or scales of another shape.
    """
    method = method_of(config)
    plain = dict(tensors)
    if method == "mxfp4":
        for blocks in [key for key in tensors if key.endswith("_blocks")]:
            key = blocks.removesuffix("_blocks")
            scales = plain.pop(f"{key}_scales", None)
            if scales is None:
                raise ModelError(f"{name}: {blocks} has no scales ({key}_scales)", hint="is the download complete?")
            plain[key] = spilled(_from_mxfp4(plain.pop(blocks), scales), scratch)
            give_back()
    elif method is not None:
        suffix = "_scale" if method == "compressed-tensors" else "_scale_inv"
        sizes = _block_sizes(config)
        for key in [key for key, tensor in tensors.items() if tensor.dtype in _EIGHT_BITS]:
            scales = plain.pop(f"{key}{suffix}", None)
            if scales is None:
                raise ModelError(f"{name}: {key} is stored in 8 bits and has no {key}{suffix}", hint=_PLAIN)
            plain[key] = spilled(_scaled(tensors[key], scales, sizes, f"{name}: {key}"), scratch)
            give_back()  # as in spilled.conversions_spilled
        # scales of activations, which are not quantised here
        plain = {key: each for key, each in plain.items() if not key.endswith((".activation_scale", ".input_scale"))}
    for key, tensor in plain.items():
        if tensor.dtype in _EIGHT_BITS:
            raise ModelError(
                f"{name}: {key} is stored as {tensor.dtype}, and config.json names no quantisation", hint=_PLAIN
            )
    return plain


def _compressed(config: Mapping[str, Any]) -> str:
    return str((config.get("quantization_config") or {}).get("format"))


def _block_sizes(config: Mapping[str, Any]) -> tuple[int, int] | None:
    sizes = (config.get("quantization_config") or {}).get("weight_block_size")
    return (int(sizes[0]), int(sizes[1])) if isinstance(sizes, list) and len(sizes) == 2 else None


def _scaled(weight_RC: Tensor, scale_rc: Tensor, sizes: tuple[int, int] | None, where: str) -> Tensor:
    """Each block of a matrix times its scale, in float32, rounded to bfloat16; leading dimensions are experts."""
    rows, columns = weight_RC.shape[-2:]
    if scale_rc.numel() == 1:
        scale_rc = scale_rc.reshape(1, 1)
        sizes = (rows, columns)
    # the last block of a row or column may be smaller, so the size of blocks does not follow from the shapes
    high, wide = sizes or (-(-rows // scale_rc.shape[-2]), -(-columns // scale_rc.shape[-1]))
    grid = (-(-rows // high), -(-columns // wide))
    fits = scale_rc.shape[:-2] in ((), weight_RC.shape[:-2]) and tuple(scale_rc.shape[-2:]) == grid
    if not fits or not scale_rc.is_floating_point():
        shapes = f"the shape {tuple(weight_RC.shape)} and scales {tuple(scale_rc.shape)} of {scale_rc.dtype}"
        raise ModelError(
            f"{where} has {shapes}, for blocks of {high} x {wide}",
            hint=_PLAIN,
        )
    scale_rC = scale_rc.float().repeat_interleave(wide, dim=-1)[..., :columns]
    plain_RC = torch.empty(weight_RC.shape, dtype=torch.bfloat16)
    for row in range(grid[0]):
        part = slice(row * high, min(rows, (row + 1) * high))
        plain_RC[..., part, :] = weight_RC[..., part, :].float() * scale_rC[..., row : row + 1, :]
    return plain_RC


def _from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Experts bfloat16 [E, in, out] of 4-bit floats uint8 [E, out, G, 16] with a power of two for each of G groups."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.bfloat16)
    experts, rows, groups, width = blocks.shape
    plain = torch.empty((experts, 2 * groups * width, rows), dtype=torch.bfloat16)
    for expert in range(experts):
        for start in range(0, rows, _ROWS_AT_A_TIME):
            part = blocks[expert, start : start + _ROWS_AT_A_TIME]
            pairs = torch.stack([values[(part & 0xF).int()], values[(part >> 4).int()]], dim=-1)
            exponents = scales[expert, start : start + _ROWS_AT_A_TIME].int() - 127
            wide = torch.ldexp(pairs.reshape(len(part), groups, -1).float(), exponents[..., None])
            plain[expert, :, start : start + len(part)] = wide.reshape(len(part), -1).T
    return plain
