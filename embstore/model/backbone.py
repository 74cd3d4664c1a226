"""A causal LM split into its backbone and its head, so that most rows never need the logits of every token.

For an affine head mean_t(W h_t + b) = W mean_t(h_t) + b: one V-wide product per prompt replaces one per token. ``probe``
determines which kind of head a model has. Both halves run the class's own code. The backbone's weights are made ready by
``layer_weights``: all at once in the *plain* order, unit by unit for many batches in the *layered* one.

Shapes: B rows, T tokens, D model width, V vocabulary, L tokens in a flat list.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from embstore.core.errors import ModelError
from embstore.core.interfaces import Check, no_check
from embstore.model.dtypes import length_limit, stored_dtype
from embstore.model.heads import AffineHead
from embstore.model.laps import Job, Lap, add_gates
from embstore.model.layer_weights import Merges, Weights
from embstore.model.residency import Residency
from embstore.model.units import parts_of


class SplitModel:
    """A causal LM cut into its backbone and everything its class does after it.

    ``module`` is the whole model, ``backbone`` its first part, which runs in the dtype that ``settle`` gave it; the head's
    weights stay as they are stored, also when they are tied. ``width`` is D, ``inner_width`` that of the feed-forward
    layers, ``num_tokens`` the number of input embeddings. With ``is_causal`` no mask is given: False is always right, and
    slower. ``is_stateful`` says that the class keeps something of a batch in its modules: batches then run one at a time.
    """

    def __init__(self, module: Any, device: torch.device, merges: Merges | None = None, *, headless: bool = False) -> None:  # noqa: ANN401
        self.module, self.device = module, device
        self.backbone = _backbone_of(module)
        if self.backbone is module and not headless:
            raise ModelError(
                f"{type(module).__name__} does not name a backbone (base_model), so its logits cannot be pooled",
                hint="use a causal LM class of transformers",
            )
        config = module.config.get_text_config()
        if getattr(config, "hidden_size", None) is None:
            raise ModelError(
                f"{type(module).__name__} does not state the width of its states (hidden_size)",
                hint="this model class is not supported; docs/models.md lists what is",
            )
        self.width: int = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * self.width
        self.inner_width: int = inner if isinstance(inner, int) else max(inner)  # Gemma3n has one for each layer
        # what a token is multiplied with; the embedding table is only looked up
        table = module.get_input_embeddings().weight
        self.num_tokens: int = table.shape[0]
        self.backbone_parameters = sum(parameter.numel() for parameter in self.backbone.parameters()) - table.numel()
        self.is_causal = self.is_stateful = False
        self.waiting_bytes_per_token = 16 * self.width  # until ``probe.measure_waiting`` has measured it
        self.stored_dtype = stored_dtype(module)
        self.length_limit = length_limit(module)  # rows on both sides of it must not share a batch
        self._output_type: type[Any] | None = None
        self._given = _shadow_forward(self.backbone)
        self._tail = _Tail(module, self.backbone)
        prefix = next((f"{name}." for name, part in module.named_modules() if part is self.backbone and name), "")
        self.weights = Weights(module, parts_of(self.backbone, prefix), merges or {}, device)
        self.residency: Residency | None = None  # None: every unit is in memory
        self._gates: list[Callable[[], None]] = []

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype."""
        return self.weights.dtype

    @property
    def why_plain(self) -> str | None:
        """Why this class can only run with all weights in memory; None if it can run unit by unit."""
        name = type(self.module).__name__
        if self.is_stateful:
            return f"{name} keeps a state in its layers, so it runs with all weights in memory"
        if getattr(self.backbone, "runs_whole", False):
            return f"{name} reaches its head through its layers, so it runs with all weights in memory"
        if not self.weights.parts.units:
            return f"{name} has no list of layers, so it runs with all weights in memory"
        return None

    # --- order --------------------------------------------------------------------------------------------------------

    def settle(self, dtype: torch.dtype, capacity_bytes: int | None, packed: Sequence[nn.Linear] = ()) -> None:
        """Compute in ``dtype`` with these layers packed: in the plain order, or ``capacity_bytes`` of units at a time."""
        self.release()
        self.weights.settle(dtype, packed, tables_here=capacity_bytes is None)
        if hasattr(self.backbone, "compute_in"):  # not a class of transformers
            self.backbone.compute_in(dtype)
        if capacity_bytes is None:
            for unit in self.weights.parts.units:
                self.weights.make(unit)()
            return
        self.residency = Residency(self.weights, capacity_bytes)
        self._gates = list(add_gates(self.weights.parts.units))

    def release(self) -> None:
        """Drop the backbone's weights; ``settle`` makes them again."""
        for remove in self._gates:
            remove()
        self._gates = []
        if self.residency is not None:
            self.residency.close()
            self.residency = None

    def run(self, jobs: Sequence[Job], check: Check = no_check) -> None:
        """Run jobs that call the backbone, in this thread, in either order: for probes."""
        if self.residency is None:
            for job in jobs:
                check()
                job()
            return
        for share in Lap(self.residency, check).share([(job, 1) for job in jobs], 1):
            share()

    # --- the two halves -----------------------------------------------------------------------------------------------

    def hidden(self, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
        """Final hidden states float32 [B, T, D], as the head receives them; undefined at padding, which is on the right."""
        # a causal model never looks to the right, and kernels without a mask are faster
        mask_BT = None if self.is_causal else real_BT.long()
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

    @property
    def head_columns(self) -> int:
        """Columns of the output layer, however many of them are asked about."""
        return self._tail.rows_of(self.module.get_output_embeddings())

    def output_layer(self, scale: float = 1.0) -> AffineHead | None:
        """The output layer's weight as it is stored, and its bias, with a known scale.

        None if it is not a linear layer over hidden states.
        """
        linear: object = self.module.get_output_embeddings()
        if not isinstance(linear, nn.Linear) or linear.weight.shape[1] != self.width:
            return None
        bias_V = None if linear.bias is None else linear.bias.detach().float()  # type: ignore[redundant-expr]  # torch's stub
        return AffineHead(weight_VD=linear.weight.detach().to(self.device), bias_V=bias_V, scale=scale)

    def probed_head(self, most_bytes: int) -> contextlib.AbstractContextManager[bool]:
        """What follows the backbone in float32; of an output layer above ``most_bytes`` only evenly spaced columns.

        The context gives whether the layer is whole.
        """
        return self._tail.in_float32(self.device, most_bytes, self.module.get_output_embeddings())

    def hold_head(self) -> None:
        """Keep all that follows the backbone in float32, for a head that is streamed by its class's own code."""
        self._tail.hold(self.device)

    def soft_caps(self) -> set[float]:
        """The soft caps of logits that the configuration names."""
        configs = (self.module.config, self.module.config.get_text_config())
        named = [item for config in configs for item in config.to_dict().items()]
        return {float(value) for name, value in named if value and "soft" in name and "cap" in name and "attn" not in name}


class _Tail:
    """The modules of a causal LM after its backbone, as they were loaded, and as they compute."""

    def __init__(self, module: nn.Module, backbone: nn.Module) -> None:
        inside = set(backbone.modules())
        self._stored = [
            (owner, name, parameter)
            for owner in module.modules()
            if owner not in inside
            for name, parameter in owner._parameters.items()
            if parameter is not None
        ]

    def rows_of(self, layer: object) -> int:
        """Rows of the stored weight of ``layer``."""
        return next(len(stored) for owner, name, stored in self._stored if owner is layer and name == "weight")

    @contextlib.contextmanager
    def in_float32(self, device: torch.device, most_bytes: int, layer: object) -> Iterator[bool]:
        """Float32 while the context is open; a large ``layer`` loses columns."""
        weight = getattr(layer, "weight", None)
        step = 1 if not isinstance(layer, nn.Linear) else max(1, -(-4 * weight.numel() // most_bytes))  # type: ignore[union-attr]  # a Linear's
        try:
            for owner, name, stored in self._stored:
                part = stored[::step] if owner is layer else stored
                owner._parameters[name] = nn.Parameter(part.to(device, torch.float32), requires_grad=False)
            yield step == 1
        finally:
            for owner, name, stored in self._stored:
                owner._parameters[name] = stored

    def hold(self, device: torch.device) -> None:
        """Float32 from now on."""
        for owner, name, stored in self._stored:
            owner._parameters[name] = nn.Parameter(stored.to(device, torch.float32), requires_grad=False)


def _backbone_of(model: Any) -> Any:  # noqa: ANN401
    """The module whose output the class makes logits of: its base model, or that one's decoder (OPT calls it directly)."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if model.base_model is model and isinstance(getattr(model, "model", None), nn.Module):
        return model.model  # Llama 4 names as its base what its text class does not have
    if decoder is None or decoder is model.base_model or decoder is model:
        return model.base_model
    used: list[Any] = []

    class _Seen(Exception):
        pass

    def see(module: Any, *_: object) -> None:  # noqa: ANN401
        used.append(module)
        raise _Seen

    hooks = [part.register_forward_pre_hook(see) for part in (model.base_model, decoder)]
    try:
        with torch.inference_mode(), contextlib.suppress(_Seen):
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return used[0] if used else model.base_model


def sdpa_without_plans(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Attention without cuDNN's kernels on CUDA: those make a plan for each new shape, and nearly every batch is one."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: contextlib.AbstractContextManager[None] = sdpa_kernel(kernels)
    return context


def _shadow_forward(backbone: Any) -> threading.local:  # noqa: ANN401
    """Make ``backbone`` return the calling thread's ``output`` while there is one: batches run in several threads."""
    given = threading.local()
    own = weakref.ref(backbone)  # no cycle: the model's memory is freed when its last user is done
    known = inspect.signature(type(backbone).forward).parameters
    takes_cache = "use_cache" in known or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())

    def forward(*args: object, **kwargs: object) -> object:
        output = getattr(given, "output", None)
        if output is not None:
            return output
        model: Any = own()
        if not takes_cache:
            kwargs.pop("use_cache", None)  # encoders of transformers 4
        return type(model).forward(model, *args, **kwargs)

    backbone.forward = forward  # an instance attribute shadows the class's method
    return given
