"""Linear layers on a CPU with their weights packed once, in oneDNN's layout, and not again at every product.

The operators are those that torch's compiler calls; they have no public name, so a torch without them runs the layers as
they are. The two give rows that differ in low bits, so ``spec.json`` says which one made them (docs/decisions/0025).
``probe.packable_layers`` finds the layers of a class that can be packed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 1024  # of a product of the backbone
_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


def can_pack(device: torch.device) -> bool:
    """Whether this torch can pack layers on this device at all."""
    return (
        device.type == "cpu"
        and torch._C._has_mkldnn
        and bool(torch._C._get_mkldnn_enabled())
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
    )


def is_packable(layer: nn.Module) -> bool:
    """Whether a layer's product is what ``nn.Linear`` says, of a weight that is an ordinary matrix."""
    if type(layer) is not nn.Linear:
        return False
    return "forward" not in vars(layer) and packs(layer.weight.dtype) and layer.weight.layout == torch.strided


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype: bfloat16 ones need instructions that a CPU with AVX2 alone lacks."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@torch.inference_mode()
def packed_for_tokens(weight: Tensor) -> Tensor:
    """A packed copy of a layer's weight."""
    return packed_weight(weight, _TOKENS)


def expect_packed(layer: nn.Module) -> None:
    """Have a layer multiply with a packed weight. It keeps its hooks; code that multiplies with its weight itself fails.

    Its weight may come later, but not this: a call takes the layer's ``forward`` before its first hook runs.
    """
    layer.forward = functools.partial(_product, layer)  # shadows the class's


def expect_plain(layer: nn.Module) -> None:
    """Undo ``expect_packed``."""
    vars(layer).pop("forward", None)


def packed_weight(weight: Tensor, num_rows: int) -> Tensor:
    """A copy in oneDNN's layout, chosen for products with ``num_rows`` rows; any other number is right, too."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return packed


def packed_product(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``given W^T + b`` for a packed weight."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(given, weight, bias, "none", [], "")
    return result


def _product(layer: Any, given: Tensor) -> Tensor:  # noqa: ANN401 - a Linear
    return packed_product(given, layer.weight, layer.bias)
