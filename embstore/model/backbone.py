"""Backbone and head of a causal LM, taken apart: mean of logits without ever holding logits of every token.

For an affine head mean_t(W h_t + b) = W mean_t(h_t) + b, so one V-wide product a prompt replaces one a token. A head counts
as affine only when its configuration names no soft cap, the class reproduces ``scale * (W h + b)`` on a probe of long
prompts to 1e-5 in float32, and still does with hidden states 64 times as large: tiny random models look affine even under a
cap, because their logits never reach it. Where a network comes between backbone and output layer, the mean is taken behind
the network. Any doubt means streaming: logits of real tokens only, a few hundred at a time, by the class's own code.

Shapes: B rows, T tokens, D model width, V vocabulary, L tokens in a flat list.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from embstore.core.errors import ModelError
from embstore.model.packed import can_pack, pack, unpack, watched_layers

_AFFINE_TOLERANCE = 1e-5
_PACKED_TOLERANCE = 2.0**-5  # relative, in 16 bits
_LOUD = 64.0
_CAUSAL_PROBE_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class AffineHead:
    """``scale * (W h + b)``: ``weight_VD`` and ``bias_V`` float32 on the model's device."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float

    def __call__(self, hidden_BD: Tensor) -> Tensor:
        """Logits float32 [B, V]."""
        logits_BV = nn.functional.linear(hidden_BD, self.weight_VD, self.bias_V)
        return logits_BV if self.scale == 1.0 else logits_BV.mul_(self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class CappedHead:
    """``cap * tanh(linear(h) / cap)`` (Gemma 2, NanoChat): what can be computed block by block without the class."""

    linear: AffineHead
    cap: float


class SplitModel:
    """A causal LM cut into its backbone and everything its class does after it.

    ``width`` is D, ``inner_width`` that of the feed-forward layers, ``num_tokens`` the number of input embeddings.
    ``backbone`` is the module; it runs in the dtype asked for, while the head's weights are held apart in float32, also when
    they are tied.
    """

    def __init__(self, model: Any, *, headless: bool = False) -> None:  # noqa: ANN401 - transformers is untyped
        self._model = model
        self.backbone = _backbone_of(model)
        if self.backbone is model and not headless:
            raise ModelError(
                f"{type(model).__name__} names no backbone (base_model), so logits cannot be pooled",
                hint="use a causal LM class of transformers",
            )
        config = model.config.get_text_config()
        self.width: int = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * self.width
        self.inner_width: int = inner if isinstance(inner, int) else max(inner)  # Gemma3n has one for each layer
        # what a token is multiplied with; the embedding table is only looked up
        table = model.get_input_embeddings().weight
        self.num_tokens: int = table.shape[0]
        self.backbone_parameters = sum(parameter.numel() for parameter in self.backbone.parameters()) - table.numel()
        self._output_type: type[Any] | None = None
        self.pools_features = False
        self._given = _shadow_forward(self.backbone)
        self.is_causal = _is_causal(self.backbone, self.num_tokens, table.device)
        head = None if headless else model.get_output_embeddings()
        if head is not None and getattr(head, "weight", None) is not None:
            # untie: the backbone may go to bfloat16, the head stays in float32
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)

    def to_dtype(self, dtype: torch.dtype) -> None:
        """Move the backbone to ``dtype``; the head stays in float32."""
        self.backbone.to(dtype)

    def pack_layers(self) -> bool:
        """Have the backbone's linear layers packed (``packed``), once its dtype is settled; tells whether any is.

        Made-up rows are tried before and after: where the class gives something else then, as one does that multiplies with
        a layer's weight itself, all is as it was. A layer that is not given all tokens of a batch (an expert's) is left
        alone, because every number of tokens makes a kernel that is kept.
        """
        table = self._model.get_input_embeddings().weight
        if not can_pack(table.device):
            return False
        tokens_2T = _made_up_rows(self.num_tokens, table.device)
        tolerance = _AFFINE_TOLERANCE if table.dtype == torch.float32 else _PACKED_TOLERANCE
        with torch.inference_mode():
            with watched_layers(self.backbone) as seen:
                plain_2TD = self.backbone(input_ids=tokens_2T, use_cache=False).last_hidden_state
            layers = [layer for layer, counts in seen.items() if counts == {tokens_2T.numel()}]
            pack(layers)
            try:
                packed_2TD = self.backbone(input_ids=tokens_2T, use_cache=False).last_hidden_state
            except Exception:  # noqa: BLE001 - any class's code runs here
                packed_2TD = torch.full_like(plain_2TD, torch.nan)
        if _relative_error(packed_2TD, plain_2TD) < tolerance:
            return bool(layers)
        unpack(layers)
        return False

    def drop_head(self) -> None:
        """Let the output layer's weights go, for whoever has a copy: ``head`` and ``logits`` fail from here on."""
        # no matrix: a product with one on torch's "meta" device gives rubbish, and no error
        self._model.get_output_embeddings().weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def hidden(self, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Final hidden states float32 [B, T, D], as the head receives them; rubbish at padding, which is on the right."""
        # a causal model never looks to the right, and kernels without a mask are faster
        mask_BT = None if self.is_causal else real_BT.long()
        with _attention(tokens_BT.device):
            output = self.backbone(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)
        self._output_type = type(output)
        hidden_BTD: Tensor = output.last_hidden_state
        return self._features(hidden_BTD.float()) if self.pools_features else hidden_BTD.float()

    def head(self, hidden_LD: Tensor) -> Tensor:
        """Logits float32 [L, V] of single hidden states, by the class's own code after its backbone."""
        if self._output_type is None:
            raise AssertionError("hidden() must run once before head()")
        # two at least: some classes take a single token for a step of generation, or refuse it
        given_LD = hidden_LD if len(hidden_LD) > 1 else hidden_LD.expand(2, -1)
        logits_1LV = self._after_backbone(self._output_type(last_hidden_state=given_LD[None]))
        return logits_1LV[0, : len(hidden_LD)].float()

    def logits(self, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Logits float32 [B, T, V] by the unmodified class: probes only, never the embedding pass."""
        output: Tensor = self._model(input_ids=tokens_BT, attention_mask=real_BT.long(), use_cache=False).logits
        return output.float()

    def affine_head(self, tokens_1T: Tensor) -> AffineHead | None:
        """The head as an affine map if it provably is one on this prompt, else None.

        Raises
        ------
        ModelError
            The class's logits cannot be reproduced from its backbone at all.
        """
        real_1T = torch.ones_like(tokens_1T, dtype=torch.bool)
        hidden_TD = self.hidden(tokens_1T, real_1T)[0]
        logits_TV = self.head(hidden_TD)
        whole_TV = self.logits(tokens_1T, real_1T)[0]
        if not torch.isfinite(whole_TV).all():
            return None  # rows will fail one by one, with their names; no verdict on the head
        if _relative_error(logits_TV, whole_TV) > _AFFINE_TOLERANCE:
            raise ModelError(
                f"{type(self._model).__name__}: logits cannot be reproduced from the backbone's last hidden state",
                hint="this model class is not supported; please report it",
            )
        plain = self.stored_affine_head(1.0)
        if self._soft_caps() or plain is None or len(plain.weight_VD) != logits_TV.shape[1]:
            return None
        mean_V, pooled_V = whole_TV.double().mean(0), plain(hidden_TD.double().mean(0).float()[None])[0].double()
        scale = float(mean_V @ pooled_V / (pooled_V @ pooled_V))
        if abs(scale - 1) < _AFFINE_TOLERANCE:
            scale = 1.0
        loud_TV = self.head(_LOUD * hidden_TD)
        fits = (
            scale > 0
            and _relative_error(scale * pooled_V, mean_V) < _AFFINE_TOLERANCE
            and _relative_error(scale * plain(_LOUD * hidden_TD), loud_TV) < _AFFINE_TOLERANCE
        )
        return self.stored_affine_head(scale) if fits else None

    def network_head(self, tokens_1T: Tensor) -> AffineHead | None:
        """The head as an affine map of what its output layer is given, if it is one on this prompt, soft and loud.

        If it is, ``hidden`` gives what the output layer is given from now on.
        """
        if self._soft_caps() or not isinstance(self._model.get_output_embeddings(), nn.Linear):
            return None
        hidden_TD = self.hidden(tokens_1T, torch.ones_like(tokens_1T, dtype=torch.bool))[0]
        states = [loudness * hidden_TD for loudness in (1.0, _LOUD)]
        expected = [self.head(state_TD) for state_TD in states]
        self.pool_features()
        plain = self.stored_affine_head(1.0)
        found = [plain(self._features(state_TD[None])[0]) for state_TD in states] if plain is not None else []
        if plain is not None and found[0].shape == expected[0].shape:
            scale = float((expected[0].double() * found[0].double()).sum() / found[0].double().square().sum())
            scale = 1.0 if abs(scale - 1) < _AFFINE_TOLERANCE else scale
            errors = [_relative_error(scale * left, right) for left, right in zip(found, expected, strict=True)]
            if scale > 0 and max(errors) < _AFFINE_TOLERANCE:
                return self.stored_affine_head(scale)
        self.pools_features, self.width = False, hidden_TD.shape[1]
        return None

    def pool_features(self) -> None:
        """Have ``hidden`` give what the output layer is given: behind a network or a projection, which this runs too."""
        layer, given = self._model.get_output_embeddings(), self._given

        def stop(_: object, arguments: tuple[Tensor, ...]) -> None:
            if getattr(given, "stops", False):
                raise _ReachedError(arguments[0])

        layer.register_forward_pre_hook(stop)
        self.inner_width = max(self.inner_width, 3 * self.width)  # activations are still those of the backbone
        self.pools_features, self.width = True, layer.in_features

    def capped_head(self, tokens_1T: Tensor) -> CappedHead | None:
        """The head as a capped linear map if its class computes just that, soft and loud, on this prompt; else None."""
        capped = self.stored_capped_head()
        if capped is None:
            return None
        hidden_TD = self.hidden(tokens_1T, torch.ones_like(tokens_1T, dtype=torch.bool))[0]
        for loudness in (1.0, _LOUD):
            expected_TV = self.head(loudness * hidden_TD)
            found_TV = torch.tanh_(capped.linear(loudness * hidden_TD).div_(capped.cap)).mul_(capped.cap)
            # the loudest logits sit at the cap whatever it is applied to: only both together are evidence
            if found_TV.shape != expected_TV.shape or not _relative_error(found_TV, expected_TV) < _AFFINE_TOLERANCE:
                return None
        return capped

    def stored_capped_head(self) -> CappedHead | None:
        """The output layer under the one cap that the configuration names; None without such a cap or layer."""
        caps, linear = self._soft_caps(), self.stored_affine_head(1.0)
        return CappedHead(linear=linear, cap=caps.pop()) if linear is not None and len(caps) == 1 else None

    def stored_affine_head(self, scale: float) -> AffineHead | None:
        """The output layer's own weight and bias with a known scale; None if it is no linear layer over hidden states."""
        linear: object = self._model.get_output_embeddings()
        if not isinstance(linear, nn.Linear) or linear.weight.shape[1] != self.width:
            return None
        bias_V = None if linear.bias is None else linear.bias.detach().float()  # type: ignore[redundant-expr]  # torch's stub
        return AffineHead(weight_VD=linear.weight.detach().float(), bias_V=bias_V, scale=scale)

    def _soft_caps(self) -> set[float]:
        """Soft caps of logits that the configuration names."""
        configs = (self._model.config, self._model.config.get_text_config())
        named = [item for config in configs for item in config.to_dict().items()]
        return {float(value) for name, value in named if value and "soft" in name and "cap" in name and "attn" not in name}

    def _features(self, hidden_BTD: Tensor) -> Tensor:
        """What the output layer is given, float32 [B, T, F]: the class's own code, left where the V-wide product begins."""
        if self._output_type is None:
            raise AssertionError("hidden() must run once before _features()")
        self._given.stops = True
        try:
            self._after_backbone(self._output_type(last_hidden_state=hidden_BTD))
        except _ReachedError as reached:
            return reached.features.float()
        finally:
            self._given.stops = False
        raise ModelError(f"{type(self._model).__name__} does not run its output layer", hint="please report it")

    def _after_backbone(self, output: Any) -> Tensor:  # noqa: ANN401
        """Logits of the class with ``output`` in the place of what its backbone gives, in this thread only."""
        self._given.output = output
        try:
            shape = output.last_hidden_state.shape[:2]
            dummy_BL = torch.zeros(shape, dtype=torch.long, device=output.last_hidden_state.device)
            logits: Tensor = self._model(input_ids=dummy_BL, use_cache=False).logits
            return logits
        finally:
            self._given.output = None


class _ReachedError(Exception):
    """The output layer was about to run; it carries what the layer was given, and belongs to one thread."""

    def __init__(self, features: Tensor) -> None:
        super().__init__("output layer")
        self.features = features


def _backbone_of(model: Any) -> Any:  # noqa: ANN401
    """The module whose output the class makes logits of: its base model, or that one's decoder (OPT calls it directly)."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model.base_model or decoder is model:
        return model.base_model
    used: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda *_: used.append(model.base_model))
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        hook.remove()
    return model.base_model if used else decoder


def _attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Without cuDNN's kernels on CUDA: those make a plan for each new shape, and nearly every batch is one."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: contextlib.AbstractContextManager[None] = sdpa_kernel(kernels)
    return context


@torch.inference_mode()
def _is_causal(backbone: Any, num_tokens: int, device: torch.device) -> bool:  # noqa: ANN401
    """Whether what follows a token leaves its hidden state alone, without any mask: tried on two made-up rows.

    A property of the class: encoders differ by far more than rounding, decoders by nothing.
    """
    tokens_2T = _made_up_rows(num_tokens, device)
    first_TD, second_TD = backbone(input_ids=tokens_2T, use_cache=False).last_hidden_state[:, :_CAUSAL_PROBE_TOKENS]
    return _relative_error(first_TD, second_TD) < _AFFINE_TOLERANCE


def _made_up_rows(num_tokens: int, device: torch.device) -> Tensor:
    """Tokens [2, 2 T] of two rows that begin with the same T tokens."""
    first_T = torch.arange(2 * _CAUSAL_PROBE_TOKENS, device=device) * 37 % num_tokens
    second_T = torch.where(torch.arange(len(first_T), device=device) < _CAUSAL_PROBE_TOKENS, first_T, first_T.flip(0))
    return torch.stack([first_T, second_T])


def _shadow_forward(backbone: Any) -> threading.local:  # noqa: ANN401
    """Make ``backbone`` return the calling thread's ``output`` while there is one: batches run in several threads."""
    given = threading.local()
    own = weakref.ref(backbone)  # no cycle: the model's memory is freed when its last user is done

    def forward(*args: object, **kwargs: object) -> object:
        output = getattr(given, "output", None)
        if output is not None:
            return output
        model: Any = own()
        return type(model).forward(model, *args, **kwargs)

    backbone.forward = forward  # an instance attribute shadows the class's method
    return given


def _relative_error(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30))
