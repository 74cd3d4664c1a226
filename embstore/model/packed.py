"""Linear layers on a CPU with their weights packed once, in oneDNN's layout, and not again at every product.

The operators are those that torch's compiler calls; they have no public name, so a torch without them runs the layers as
they are. The two give rows that differ in low bits, so ``spec.json`` says which one made them (docs/decisions/0025).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from embstore.model.backbone import SplitModel
from embstore.model.probe import TOLERANCE, made_up_rows, relative_error

_TOLERANCE_16 = 2.0**-5  # relative, in 16 bits
_TOKENS = 1024  # of a product of the backbone
_DTYPES = (torch.float32, torch.bfloat16)
_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")


def can_pack(device: torch.device) -> bool:
    """Whether this torch can pack layers on this device at all."""
    return (
        device.type == "cpu"
        and torch._C._has_mkldnn
        and bool(torch._C._get_mkldnn_enabled())
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
    )


@torch.inference_mode()
def pack_layers(model: SplitModel) -> bool:
    """Pack the backbone's linear layers, once its dtype is settled; tells whether any is packed.

    Made-up rows are tried before and after: where the class then gives something else, as one does that multiplies with a
    layer's weight itself, everything is put back. A layer that is not given all tokens of a batch (an expert's) is left
    alone, because every number of tokens makes a kernel that is kept.
    """
    if not can_pack(model.device):
        return False
    tokens_2T = made_up_rows(model)
    with watched_layers(model.backbone) as seen:
        plain_2TD = model.backbone(input_ids=tokens_2T, use_cache=False).last_hidden_state
    layers = [layer for layer, counts in seen.items() if counts == {tokens_2T.numel()}]
    pack(layers)
    try:
        packed_2TD = model.backbone(input_ids=tokens_2T, use_cache=False).last_hidden_state
    except Exception:  # noqa: BLE001 - any class's code runs here
        packed_2TD = torch.full_like(plain_2TD, torch.nan)
    if relative_error(packed_2TD, plain_2TD) < (TOLERANCE if model.dtype == torch.float32 else _TOLERANCE_16):
        return bool(layers)
    unpack(layers)
    return False


@contextlib.contextmanager
def watched_layers(module: nn.Module) -> Iterator[dict[nn.Linear, set[int]]]:
    """The plain linear layers of ``module`` that are called in this context, with the numbers of tokens they were given."""
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

    Each plain weight is freed before the next one is packed, so the model takes no more memory than before. A packed layer
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
