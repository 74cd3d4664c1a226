"""In which dtype a class holds each of its tensors: the rules of ``from_pretrained(dtype=...)``, without loading anything.

A checkpoint is loaded as it is stored, and each tensor is cast when it is used. To which dtype depends on the class: some
keep routers, norms or state-space parameters in float32, and buffers that are in no file are computed under the default
dtype of the construction (the scale of Gemma's embeddings is then rounded to bfloat16). So a *twin* of the class is made on
torch's meta device under that default dtype, as ``from_pretrained`` makes it; it has no weights.

Sources: ``PreTrainedModel.from_pretrained``, ``_get_dtype_plan`` and ``_finalize_model_loading`` of transformers 5.24, and
``_infer_parameter_dtype`` of 4.57.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from embstore.core.decode import words_of
from embstore.core.errors import ModelError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype in which most of the model's weights are stored; float32 for a model without any."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.dtype in _FLOATS:
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def compute_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each parameter and persistent buffer as ``from_pretrained(dtype=dtype)`` would hold it.

    Names are those of ``named_parameters()`` and ``named_buffers()``; tied parameters appear once. A model that is not of
    transformers has no rules: its floating tensors are all in ``dtype``.

    Raises
    ------
    ModelError
        The class cannot be constructed a second time from its own configuration.
    """
    skipped = set(_non_persistent(model))
    named = dict(model.named_parameters()) | {name: each for name, each in model.named_buffers() if name not in skipped}
    if not isinstance(model, transformers.PreTrainedModel):
        return {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in named.items()}
    twin = _twin(model, dtype)
    made = twin.state_dict(keep_vars=True)
    is_kept_in_float32 = _float32_rule(twin, dtype)
    sources = _tied_sources(model)
    found = {}
    for name, tensor in named.items():
        loaded_as = sources.get(name, name)
        # a part taken out of a model may have been given its table of tokens by the whole
        as_asked = dtype if tensor.is_floating_point() else tensor.dtype
        as_made = made[loaded_as].dtype if loaded_as in made else as_asked
        found[name] = torch.float32 if tensor.is_floating_point() and is_kept_in_float32(loaded_as) else as_made
    return found


def fresh_buffers(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The buffers that are in no file, on the CPU, as ``from_pretrained(dtype=dtype)`` would compute them.

    A model that is not of transformers has no rules: its own buffers are given, the floating ones cast.

    Raises
    ------
    ModelError
        The class cannot be constructed a second time from its own configuration.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        buffers = _non_persistent(model)
        return {name: each.to(dtype) if each.is_floating_point() else each for name, each in buffers.items()}
    twin = _twin(model, dtype)
    for tensor in twin.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # loaded from the file: nothing initialises it
    # transformers 4 makes them on the CPU, 5 fills them afterwards
    empty = {name: buffer for name, buffer in _non_persistent(twin).items() if buffer.is_meta}
    for name, buffer in empty.items():
        _owner(twin, name)._buffers[name.rpartition(".")[2]] = torch.empty_like(buffer, device="cpu")
    if empty:
        with torch.random.fork_rng(devices=[]):
            twin.initialize_weights()
    return _non_persistent(twin)


def set_config_dtype(config: Any, dtype: torch.dtype) -> None:  # noqa: ANN401 - transformers is untyped
    """Note in a configuration, and in those of its parts, which dtype computes, as ``from_pretrained`` does."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if part is not None:
            setattr(part, "dtype" if hasattr(part, "dtype") else "torch_dtype", dtype)


def length_limit(model: nn.Module) -> int | None:
    """The number of tokens above which the class computes *every* position of a batch differently; None where it does not.

    "longrope" (Phi-3, Phi-4-mini, MiniCPM) takes other frequencies when the padded batch is longer than this, and keeps them
    in the module. So rows on both sides must not share a batch, and batches must run one at a time where both kinds exist.
    "dynamic" NTK does so above the positions of the model, which no prompt exceeds.
    """
    config: Any = model.config
    limits = [
        int(found)
        for rope, settings in _rope_settings(config)
        if rope == "longrope" and (found := _original_positions(config, settings)) is not None
    ]
    return min(limits, default=None)


def _rope_settings(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:  # noqa: ANN401 - transformers is untyped
    """Kind and settings of each rotary embedding that the text configuration names, by layer type or for all layers."""
    text = config.get_text_config()
    # transformers 5 has one name for what were two settings
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for settings in (given, *given.values()):
        if isinstance(settings, Mapping):
            yield str(settings.get("rope_type") or settings.get("type") or ""), settings


def _original_positions(config: Any, settings: Mapping[str, Any]) -> int | None:  # noqa: ANN401
    text = config.get_text_config()
    for found in (
        getattr(text, "original_max_position_embeddings", None),
        settings.get("original_max_position_embeddings"),
        getattr(text, "max_position_embeddings", None),
    ):
        if isinstance(found, int):
            return found
    return None


def _twin(model: transformers.PreTrainedModel, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """The model's class on the meta device, made under ``dtype``, with the model's configuration."""
    kind = type(model)
    config = copy.deepcopy(model.config)
    set_config_dtype(config, dtype)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_default_dtype(dtype))
            for context in _init_context(kind, dtype):
                stack.enter_context(context)
            return kind(config).eval()
    except Exception as error:  # any class's constructor runs here
        raise ModelError(
            f"{kind.__name__} cannot be constructed from its own configuration: {words_of(error)}",
            hint="this model class is not supported; please report it",
        ) from error


def _init_context(kind: Any, dtype: torch.dtype) -> list[Any]:  # noqa: ANN401
    """The class's own contexts of ``from_pretrained``; their arguments differ between versions."""
    known = {"dtype": dtype, "is_quantized": False, "_is_ds_init_called": False, "allow_all_kernels": None}
    wanted = inspect.signature(kind.get_init_context).parameters
    contexts: list[Any] = kind.get_init_context(**{name: known[name] for name in wanted if name in known})
    return contexts


def _float32_rule(twin: Any, dtype: torch.dtype) -> Callable[[str], bool]:  # noqa: ANN401
    """Whether the class keeps a parameter of this name in float32 when it is loaded in ``dtype``."""
    if hasattr(twin, "_get_dtype_plan"):
        patterns = [name.replace("*", ".*") for name in twin._get_dtype_plan(dtype)]
    else:
        names = [*(twin._keep_in_fp32_modules or ())] if dtype == torch.float16 else []
        if dtype in (torch.float16, torch.bfloat16):
            names += twin._keep_in_fp32_modules_strict or ()
        patterns = [rf"(^|\.){name}($|\.)" for name in names]
    rule = re.compile("|".join(patterns))
    return lambda name: bool(patterns) and rule.search(name) is not None


def _tied_sources(model: nn.Module) -> dict[str, str]:
    """For a parameter that is another's: the name under which the file has it."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: source for name, source in tied.items() if parameters.get(name) is parameters.get(source)}


def _non_persistent(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that ``state_dict`` leaves out."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in _owner(model, name)._non_persistent_buffers_set
    }


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
