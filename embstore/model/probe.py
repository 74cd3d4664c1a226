"""What is this model? Its kind of head, and whether it looks ahead: found once, by running its class on a few tokens.

Tiny random models look affine even under a soft cap, because their logits never come near it. So a head counts as affine
only when its configuration names no cap, the class agrees with ``scale * (W h + b)`` on the tokens of a long prompt, and
still agrees when the hidden states are 64 times as large. Whatever remains in doubt is streamed, which is always right.

Shapes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embstore.core.errors import ModelError
from embstore.core.spec import Head
from embstore.model.backbone import SplitModel
from embstore.model.heads import AffineHead, CappedHead
from embstore.model.tokens import TokenRow

TOLERANCE = 1e-5  # relative, in float32
_LOUD = 64.0
_HEAD_TOKENS = 128  # one [1, T, V] tensor of this length is the only place where logits of every token exist
_SHARED_TOKENS = 16


@torch.inference_mode()
def find_head(model: SplitModel, tokens_1T: Tensor, space: str) -> tuple[Head, int]:
    """The kind of a model's head, and the number of columns of its rows.

    Raises
    ------
    ModelError
        The logits of the class do not follow from its backbone's last hidden state.
    """
    if space == "hidden":
        return Head(kind="none"), model.width
    real_1T = torch.ones_like(tokens_1T, dtype=torch.bool)
    hidden_TD = model.hidden(tokens_1T, real_1T)[0]
    soft_TV, whole_TV = model.head(hidden_TD), model.logits(tokens_1T, real_1T)[0]
    columns = soft_TV.shape[1]
    is_finite = bool(torch.isfinite(whole_TV).all())  # if not, rows fail one by one, each with its name
    if is_finite and relative_error(soft_TV, whole_TV) > TOLERANCE:
        raise ModelError(
            f"{type(model.module).__name__}: logits cannot be reproduced from the backbone's last hidden state",
            hint="this model class is not supported; please report it",
        )
    layer, caps = model.output_layer(), model.soft_caps()
    if layer is None or len(layer.weight_VD) != columns:
        return Head(kind="streamed"), columns
    loud_TV = model.head(_LOUD * hidden_TD)
    if not caps and is_finite:
        # pooled first, as a build does it
        mean_V, pooled_V = whole_TV.double().mean(0), layer(hidden_TD.double().mean(0).float()[None])[0].double()
        scale = float(mean_V @ pooled_V / (pooled_V @ pooled_V))
        scale = 1.0 if abs(scale - 1) < TOLERANCE else scale
        agrees = relative_error(scale * pooled_V, mean_V) < TOLERANCE
        if scale > 0 and agrees and relative_error(scale * layer(_LOUD * hidden_TD), loud_TV) < TOLERANCE:
            return Head(kind="affine", scale=scale), columns
    if len(caps) == 1:
        capped = CappedHead(linear=layer, cap=min(caps))
        # the loudest logits are at the cap whatever it is applied to: only both together are evidence
        if all(
            relative_error(capped(loudness * hidden_TD), class_TV) < TOLERANCE
            for loudness, class_TV in ((1.0, soft_TV), (_LOUD, loud_TV))
        ):
            return Head(kind="capped"), columns
    return Head(kind="streamed"), columns


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


def split_model(module: Any, *, headless: bool = False) -> SplitModel:  # noqa: ANN401 - transformers is untyped
    """A model taken apart, to be run without a mask if its class never looks ahead.

    Tried on two made-up rows that differ in their second half: encoders then differ in the first half by far more than
    rounding, decoders by nothing.
    """
    model = SplitModel(module, headless=headless)
    tokens_2T = made_up_rows(model)
    with torch.inference_mode():
        states_2TD = model.backbone(input_ids=tokens_2T, use_cache=False).last_hidden_state[:, :_SHARED_TOKENS]
    model.is_causal = relative_error(states_2TD[0], states_2TD[1]) < TOLERANCE
    return model


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
