"""Linear layers on a CPU with their weights packed once, in oneDNN's layout, and not again at every product.

The operators are those that torch's compiler calls; they have no public name, so a torch without them runs the layers as
they are. Rows differ in low bits, so ``spec.json`` says which of the two made them (docs/decisions/0025).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from embstore.core.spec import PACKED_HEAD, PACKED_LAYERS
from embstore.host.device import capability_of

_TOKENS = 1024  # of a product of the backbone
_DTYPES = (torch.float32, torch.bfloat16)
_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")


def can_pack(device: torch.device) -> bool:
    """Whether packed layers can be had on this device at all."""
    return (
        device.type == "cpu"
        and torch._C._has_mkldnn
        and bool(torch._C._get_mkldnn_enabled())
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
    )


def best_capability(device: torch.device) -> str:
    """What decides a kernel's bits on this device, with everything packed that can be; see ``core.spec.EmbeddingSpec``."""
    return capability_of(device) + (PACKED_LAYERS + PACKED_HEAD if can_pack(device) else "")


@contextlib.contextmanager
def watched_layers(module: nn.Module) -> Iterator[dict[nn.Linear, set[int]]]:
    """The plain linear layers of ``module`` that are called meanwhile, each with the numbers of tokens that it was given."""
    seen: dict[nn.Linear, set[int]] = {}

    def note(layer: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
        if arguments:  # not called by keyword, as a packed one cannot be
            seen.setdefault(layer, set()).add(arguments[0].numel() // layer.in_features)

    layers = [layer for layer in module.modules() if type(layer) is nn.Linear and _is_plain(layer)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def pack(layers: Iterable[nn.Linear]) -> None:
    """Pack the weights of plain layers, in place.

    The weights as they were are gone, one after the other, so the model takes no more memory than before. A packed layer
    keeps its dtype, shape and hooks; code that multiplies with its weight itself fails.
    """
    for layer in layers:
        layer.weight = nn.Parameter(packed_weight(layer.weight, _TOKENS), requires_grad=False)
        layer.forward = functools.partial(_product, layer)  # type: ignore[method-assign]  # shadows the class's


def unpack(layers: Iterable[nn.Linear]) -> None:
    """Undo ``pack``: the same weights to the bit."""
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.to_dense(), requires_grad=False)
        del layer.forward


def packed_weight(weight: Tensor, num_rows: int) -> Tensor:
    """A copy in oneDNN's layout, chosen for products with ``num_rows`` rows; any other number is right, too."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return packed


def packed_product(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``given W^T + b`` for a packed weight."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(given, weight, bias, "none", [], "")
    return result


def _is_plain(layer: nn.Linear) -> bool:
    """Whether a layer's product is what its class says, of a weight that is an ordinary matrix."""
    weight = layer.weight
    return "forward" not in vars(layer) and weight.dtype in _DTYPES and weight.layout == torch.strided


def _product(layer: nn.Linear, given: Tensor) -> Tensor:
    return packed_product(given, layer.weight, layer.bias)
