"""What is this model? Asked once of a class, by running it on a few tokens in float32, a unit of weights at a time.

Does it look ahead, does it keep something of a batch, does padding change a row? What kind is its head? Which of its layers
can be packed?

Tiny random models look affine even under a soft cap, because their logits never come near it. So a head counts as affine
only when its configuration names no cap, the class agrees with ``scale * (W h + b)`` on the tokens of a long prompt, and
still agrees when the hidden states are 64 times as large. Whatever remains in doubt is streamed, which is always right. A
large output layer is asked about evenly spaced columns.

Shapes: T tokens, D model width, V vocabulary (or the columns asked about).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embstore.core.errors import ModelError
from embstore.core.spec import Head
from embstore.model.backbone import SplitModel
from embstore.model.heads import AffineHead, CappedHead
from embstore.model.packed import can_pack, is_packable
from embstore.model.tokens import TokenRow

TOLERANCE = 1e-5  # relative, in float32
_TOLERANCE_16 = 2.0**-5  # relative, in 16 bits
_PADDING_TOLERANCE = 1e-3  # relative: a mask that is ignored moves states by far more
_LOUD = 64.0
_HEAD_TOKENS = 128  # one [1, T, V] tensor of this length is the only place where logits of every token exist
_HEAD_BYTES = 64 << 20  # of an output layer in float32
_SHARED_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class _Heard:
    """What the class said of one prompt: hidden states [T, D], its logits [T, V], and its head's logits of given states."""

    hidden_TD: Tensor
    whole_TV: Tensor
    soft_TV: Tensor
    loud_TV: Tensor


@torch.inference_mode()
def examine(model: SplitModel, tokens_1T: Tensor | None = None) -> tuple[Head, int]:
    """Find out whether a class is causal and keeps state, and with ``tokens_1T`` its head and the columns of its rows.

    The model is settled in float32 before. Without tokens, the head is "none".

    Raises
    ------
    ModelError
        The class cannot be run, ignores the attention mask, or its logits do not follow from its backbone's last hidden
        state.
    """
    rows_2T = made_up_rows(model)
    states: dict[str, Tensor] = {}
    real_2T = torch.ones_like(rows_2T, dtype=torch.bool)
    before = _kept(model.backbone)

    def run(name: str, tokens_BT: Tensor, real_BT: Tensor) -> None:
        states[name] = model.hidden(tokens_BT, real_BT)

    short_1T = rows_2T[:1, :_SHARED_TOKENS]
    is_shared_T = torch.arange(rows_2T.shape[1], device=model.device) < _SHARED_TOKENS
    jobs = [
        lambda: run("both", rows_2T, real_2T),
        lambda: run("alone", short_1T, real_2T[:1, :_SHARED_TOKENS]),
        lambda: run("padded", rows_2T[:1].masked_fill(~is_shared_T, 0), is_shared_T[None]),
    ]
    probed_head = contextlib.nullcontext(True) if tokens_1T is None else model.probed_head(_HEAD_BYTES)
    with _named(model), probed_head as is_whole:
        if tokens_1T is None:
            model.run(jobs)
        else:
            heard, columns = _hear(model, tokens_1T, jobs)
        both_2TD = states["both"][:, :_SHARED_TOKENS]
        # rows that differ in their second half: encoders then differ in the first half by far more than rounding
        model.is_causal = relative_error(both_2TD[0], both_2TD[1]) < TOLERANCE
        if (
            not model.is_causal
            and relative_error(states["padded"][:, :_SHARED_TOKENS], states["alone"]) > _PADDING_TOLERANCE
        ):
            raise ModelError(
                f"{type(model.module).__name__} is not causal and ignores the attention mask: rows would depend on padding",
                hint="embstore cannot embed with this class; choose another model",
            )
        if before != _kept(model.backbone):
            model.is_stateful = _is_stateful(model, rows_2T, short_1T)
        if tokens_1T is None:
            return Head(kind="none"), model.width
        head = _head_of(model, heard, model.output_layer())
    if head.kind == "streamed":
        model.hold_head()
        return head, model.head(heard.hidden_TD[:2]).shape[1]
    return head, columns if is_whole else model.head_columns


def _hear(model: SplitModel, tokens_1T: Tensor, jobs: Sequence[object]) -> tuple[_Heard, int]:
    real_1T = torch.ones_like(tokens_1T, dtype=torch.bool)
    found: dict[str, Tensor] = {}

    def hidden() -> None:
        found["hidden"] = model.hidden(tokens_1T, real_1T)[0]

    def whole() -> None:
        found["whole"] = model.logits(tokens_1T, real_1T)[0]

    model.run([*jobs, hidden, whole])  # type: ignore[list-item]
    hidden_TD = found["hidden"]
    heard = _Heard(
        hidden_TD=hidden_TD,
        whole_TV=found["whole"],
        soft_TV=model.head(hidden_TD),
        loud_TV=model.head(_LOUD * hidden_TD),
    )
    return heard, heard.soft_TV.shape[1]


def _head_of(model: SplitModel, heard: _Heard, layer: AffineHead | None) -> Head:
    hidden_TD, whole_TV, soft_TV = heard.hidden_TD, heard.whole_TV, heard.soft_TV
    is_finite = bool(torch.isfinite(whole_TV).all())  # if not, rows fail one by one, each with its name
    if is_finite and relative_error(soft_TV, whole_TV) > TOLERANCE:
        raise ModelError(
            f"{type(model.module).__name__}: logits cannot be reproduced from the backbone's last hidden state",
            hint="this model class is not supported; please report it",
        )
    caps = model.soft_caps()
    if layer is None or len(layer.weight_VD) != soft_TV.shape[1]:
        return Head(kind="streamed")
    if not caps and is_finite:
        # pooled first, as a build does it
        mean_V, pooled_V = whole_TV.double().mean(0), layer(hidden_TD.double().mean(0).float()[None])[0].double()
        scale = float(mean_V @ pooled_V / (pooled_V @ pooled_V))
        scale = 1.0 if abs(scale - 1) < TOLERANCE else scale
        agrees = relative_error(scale * pooled_V, mean_V) < TOLERANCE
        if scale > 0 and agrees and relative_error(scale * layer(_LOUD * hidden_TD), heard.loud_TV) < TOLERANCE:
            return Head(kind="affine", scale=scale)
    if len(caps) == 1:
        capped = CappedHead(linear=layer, cap=min(caps))
        # the loudest logits are at the cap whatever it is applied to: only both together are evidence
        if all(
            relative_error(capped(loudness * hidden_TD), class_TV) < TOLERANCE
            for loudness, class_TV in ((1.0, soft_TV), (_LOUD, heard.loud_TV))
        ):
            return Head(kind="capped")
    return Head(kind="streamed")


@contextlib.contextmanager
def _named(model: SplitModel) -> Iterator[None]:
    """An error of the class's own code, with the class's name."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # any class's code runs here
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{type(model.module).__name__} cannot be run on token ids alone in {str(model.dtype).removeprefix('torch.')}: "
            f"{message[0][:300]}",
            hint="embstore runs causal LMs, and encoders with --space hidden; docs/models.md lists what is refused",
        ) from error


def _kept(backbone: nn.Module) -> dict[tuple[int, str], int]:
    """The tensors that modules hold in addition to their parameters, by where they lie."""
    return {
        (id(module), name): value.data_ptr()
        for module in backbone.modules()
        for name, value in (*vars(module).items(), *module._buffers.items())
        if isinstance(value, Tensor)
    }


def _is_stateful(model: SplitModel, long_2T: Tensor, short_1T: Tensor) -> bool:
    """Whether a short batch changes what a long one left in the modules: a cache of constants stays, a state does not."""
    model.run([lambda: _discard(model, long_2T)])
    left = _kept(model.backbone)
    model.run([lambda: _discard(model, short_1T)])
    return left != _kept(model.backbone)


def _discard(model: SplitModel, tokens_BT: Tensor) -> None:
    model.hidden(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))


@torch.inference_mode()
def packable_layers(model: SplitModel, settle: Callable[[Sequence[nn.Linear]], None]) -> list[nn.Linear]:
    """The backbone's linear layers that can be packed; ``settle`` settles the model with given layers packed.

    Made-up rows are tried before and after: where the class then gives something else, as one does that multiplies with a
    layer's weight itself, no layer is packed. A layer that is not given all tokens of a batch (an expert's) is left alone,
    because every number of tokens makes a kernel that is kept.
    """
    rows_2T = made_up_rows(model)
    if not can_pack(model.device):
        if model.residency is not None:
            measure_waiting(model, lambda: _discard(model, rows_2T), rows_2T.numel())
        return []
    found: dict[str, Tensor] = {}

    def run(name: str) -> None:
        found[name] = model.hidden(rows_2T, torch.ones_like(rows_2T, dtype=torch.bool))

    with watched_layers(model.backbone) as seen:
        measure_waiting(model, lambda: run("plain"), rows_2T.numel())
    layers = [layer for layer, counts in seen.items() if counts == {rows_2T.numel()}]
    settle(layers)
    try:
        model.run([lambda: run("packed")])
    except Exception:  # noqa: BLE001 - any class's code runs here
        found["packed"] = torch.full_like(found["plain"], torch.nan)
    tolerance = TOLERANCE if model.dtype == torch.float32 else _TOLERANCE_16
    if relative_error(found["packed"], found["plain"]) < tolerance:
        return layers
    settle([])
    return []


def measure_waiting(model: SplitModel, job: Callable[[], None], num_tokens: int) -> None:
    """Run one batch, and note how much of it waits at the gates of units: ``waiting_bytes_per_token``."""
    living = _LivingBytes()

    def traced() -> None:
        with living:
            job()

    gates = [gate for unit in model.weights.parts.units for gate in unit.gates]
    hooks = [gate.register_forward_pre_hook(living.note, prepend=True) for gate in gates]
    try:
        model.run([traced])
    finally:
        for hook in hooks:
            hook.remove()
    if living.most_bytes:
        model.waiting_bytes_per_token = -(-living.most_bytes // num_tokens)


class _LivingBytes(TorchDispatchMode):
    """Bytes of the tensors that operators have made in this context and that are still in use."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most_bytes = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.layout == torch.strided:
                storage = each.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        return result

    def note(self, module: nn.Module, arguments: object) -> None:
        """What lives now, at a gate."""
        self._made = {key: each for key, each in self._made.items() if not each[0].expired()}  # type: ignore[no-untyped-call]
        self.most_bytes = max(self.most_bytes, sum(num_bytes for _, num_bytes in self._made.values()))


@contextlib.contextmanager
def watched_layers(module: nn.Module) -> Iterator[dict[nn.Linear, set[int]]]:
    """The plain linear layers of ``module`` that are called in this context, with the numbers of tokens they were given."""
    seen: dict[nn.Linear, set[int]] = {}

    def note(layer: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
        if arguments and is_packable(layer):  # not called by keyword, as a packed one cannot be
            seen.setdefault(layer, set()).add(arguments[0].numel() // layer.in_features)

    hooks = [layer.register_forward_pre_hook(note) for layer in module.modules() if type(layer) is nn.Linear]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def open_head(model: SplitModel, head: Head) -> AffineHead | CappedHead | None:
    """The tensors of a head whose kind is known; None where rows are made without them ("streamed", "none").

    Raises
    ------
    ModelError
        The model has no output layer for this kind of head.
    """
    if head.kind in ("streamed", "none"):
        return None
    layer, caps = model.output_layer(head.scale), model.soft_caps()
    if head.kind == "affine" and layer is not None:
        return layer
    if head.kind == "capped" and layer is not None and len(caps) == 1:
        return CappedHead(linear=layer, cap=min(caps))
    raise ModelError(
        f"{type(model.module).__name__} does not have the {head.kind} head of the store",
        hint="continue with the versions of embstore and transformers that began the store",
    )


def probe_tokens(sample: Sequence[TokenRow]) -> Tensor:
    """Tokens [1, T] of the longest sampled prompt, 2 to 128 of them."""
    longest = max(sample, key=lambda row: len(row.ids_T)).ids_T[:_HEAD_TOKENS]
    # at least two, as in every batch
    return torch.from_numpy(np.resize(longest, max(2, len(longest))) if len(longest) else np.zeros(2, dtype=np.int64))[None]


def made_up_rows(model: SplitModel) -> Tensor:
    """Tokens [2, 32] of two rows whose first 16 tokens are the same."""
    first_T = torch.arange(2 * _SHARED_TOKENS, device=model.device) * 37 % model.num_tokens
    is_shared = torch.arange(len(first_T), device=model.device) < _SHARED_TOKENS
    return torch.stack([first_T, torch.where(is_shared, first_T, first_T.flip(0))])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30))
