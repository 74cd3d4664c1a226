"""A causal LM split into its backbone and its head, so that most rows never need the logits of every token.

For an affine head mean_t(W h_t + b) = W mean_t(h_t) + b: one V-wide product per prompt replaces one per token. ``probe``
determines which kind of head a model has. Both halves run the class's own code.

Shapes: B rows, T tokens, D model width, V vocabulary, L tokens in a flat list.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from embstore.core.errors import ModelError
from embstore.model.heads import AffineHead


class SplitModel:
    """A causal LM cut into its backbone and everything its class does after it.

    ``module`` is the whole model, ``backbone`` its first part, which runs in the dtype asked for; the head's weights are
    kept apart as they were loaded, also when they are tied. ``width`` is D, ``inner_width`` that of the feed-forward layers,
    ``num_tokens`` the number of input embeddings. With ``is_causal`` no mask is given: False is always right, and slower.
    """

    def __init__(self, module: Any, *, headless: bool = False) -> None:  # noqa: ANN401 - transformers is untyped
        self.module = module
        self.backbone = _backbone_of(module)
        if self.backbone is module and not headless:
            raise ModelError(
                f"{type(module).__name__} does not name a backbone (base_model), so its logits cannot be pooled",
                hint="use a causal LM class of transformers",
            )
        config = module.config.get_text_config()
        self.width: int = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * self.width
        self.inner_width: int = inner if isinstance(inner, int) else max(inner)  # Gemma3n has one for each layer
        # what a token is multiplied with; the embedding table is only looked up
        table = module.get_input_embeddings().weight
        self.num_tokens: int = table.shape[0]
        self.backbone_parameters = sum(parameter.numel() for parameter in self.backbone.parameters()) - table.numel()
        self.is_causal = False
        self._output_type: type[Any] | None = None
        self._given = _shadow_forward(self.backbone)
        head = None if headless else module.get_output_embeddings()
        if head is not None and getattr(head, "weight", None) is not None:
            # untie without a copy: the backbone may go to bfloat16, the head keeps the tensor that was loaded
            head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype."""
        dtype: torch.dtype = self.module.get_input_embeddings().weight.dtype
        return dtype

    def to_dtype(self, dtype: torch.dtype) -> None:
        """Move the backbone to ``dtype``; the head stays as it was loaded."""
        self.backbone.to(dtype)

    def hidden(self, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Final hidden states float32 [B, T, D], as the head receives them; undefined at padding, which is on the right."""
        # a causal model never looks to the right, and kernels without a mask are faster
        mask_BT = None if self.is_causal else real_BT.long()
        with _attention(tokens_BT.device):
            output = self.backbone(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)
        self._output_type = type(output)
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD.float()

    def head(self, hidden_LD: Tensor) -> Tensor:
        """Logits float32 [L, V] of single hidden states, by the class's own code after its backbone."""
        if self._output_type is None:
            raise AssertionError("hidden() must run once before head()")
        # at least two: some classes take a single token for a step of generation, or refuse it
        given_1LD = (hidden_LD if len(hidden_LD) > 1 else hidden_LD.expand(2, -1))[None]
        self._given.output = self._output_type(last_hidden_state=given_1LD)  # in this thread only
        try:
            dummy_1L = torch.zeros(given_1LD.shape[:2], dtype=torch.long, device=hidden_LD.device)
            logits_1LV: Tensor = self.module(input_ids=dummy_1L, use_cache=False).logits
        finally:
            self._given.output = None
        return logits_1LV[0, : len(hidden_LD)].float()

    def logits(self, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Logits float32 [B, T, V] by the unmodified class: for probes only."""
        output: Tensor = self.module(input_ids=tokens_BT, attention_mask=real_BT.long(), use_cache=False).logits
        return output.float()

    def output_layer(self, scale: float = 1.0) -> AffineHead | None:
        """The output layer's weight as it is stored, and its bias, with a known scale.

        None if it is not a linear layer over hidden states.
        """
        linear: object = self.module.get_output_embeddings()
        if not isinstance(linear, nn.Linear) or linear.weight.shape[1] != self.width:
            return None
        bias_V = None if linear.bias is None else linear.bias.detach().float()  # type: ignore[redundant-expr]  # torch's stub
        return AffineHead(weight_VD=linear.weight.detach(), bias_V=bias_V, scale=scale)

    def soft_caps(self) -> set[float]:
        """The soft caps of logits that the configuration names."""
        configs = (self.module.config, self.module.config.get_text_config())
        named = [item for config in configs for item in config.to_dict().items()]
        return {float(value) for name, value in named if value and "soft" in name and "cap" in name and "attn" not in name}

    def drop_head(self) -> None:
        """Free the output layer's weights, of which the caller has a copy; ``head`` and ``logits`` fail from here on."""
        # not a matrix: a product with one on torch's "meta" device gives garbage without an error
        self.module.get_output_embeddings().weight = nn.Parameter(torch.empty(0), requires_grad=False)


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
