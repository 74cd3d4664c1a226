"""PEFT adapters without a merged copy of the model: the base stays mapped, and an adapted weight is merged when it is used.

The adapter's layers are put around the base model to be read, and taken out again. For each of them a function is kept
that runs the layer's own ``merge(safe_merge=True)`` on a given weight, so that a merged weight equals that of
``merge_and_unload`` on a model loaded in that weight's dtype. What an adapter stores as whole tensors
(``modules_to_save``, trained biases) takes the place of the base's.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from embstore.core.decode import words_of
from embstore.core.errors import EmbstoreError, ModelError
from embstore.model.formats import Merge
from embstore.model.weight_files import mapped_tensors

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_BASE = "base_model.model."  # what peft puts before every name
_MERGE_FIRST = "merge it where it was trained (merge_and_unload, save_pretrained) and give that folder"


def with_adapter(model: Any, adapter: Path) -> tuple[Any, dict[nn.Module, Merge]]:  # noqa: ANN401
    """The base model, its own class, with the whole tensors of the adapter; and a merge for each module it adapts.

    Raises
    ------
    ModelError
        peft is not installed, the adapter is of another model, or of a kind that cannot be merged one weight at a time.
    """
    try:
        import peft  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ModelError(
            f"{adapter} is a PEFT adapter, and peft is not installed", hint="pip install 'embstore[peft]'"
        ) from error
    _refuse_kinds(adapter)
    shared = _shared_parameters(model)
    try:
        with warnings.catch_warnings():
            # otherwise an adapter of another model changes nothing, silently
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            adapted = peft.PeftModel.from_pretrained(model, adapter, is_trainable=False)
            if not hasattr(adapted, "unload"):
                raise ModelError(
                    f"{adapter} does not change weights ({type(adapted).__name__}), so it cannot be merged",
                    hint=_MERGE_FIRST,
                )
            plain, merges = _taken_out(adapted, shared, str(adapter))
    except EmbstoreError:
        raise
    except Exception as error:  # peft raises whatever its layers raise
        raise ModelError(
            f"{adapter} does not fit its base model: {words_of(error)}", hint="was it trained on this base model?"
        ) from error
    _take_whole_tensors(plain, adapter)
    plain.requires_grad_(False)
    return plain.eval(), merges


def without_adapter(adapted: Any) -> tuple[Any, dict[nn.Module, Merge]]:  # noqa: ANN401
    """A PEFT model in memory: its base model, and a merge for each module that its active adapters change still.

    It is taken apart. Disabled adapters change nothing, and those that are merged in place are not merged again.

    Raises
    ------
    ModelError
        The adapter cannot be merged one weight at a time.
    """
    where = f"the adapter of {type(adapted.get_base_model()).__name__}"
    if not hasattr(adapted, "unload"):
        raise ModelError(f"{where} does not change weights, so it cannot be merged", hint=_MERGE_FIRST)
    if any("modules_to_save" in name.split(".") for name, _ in adapted.named_modules()):
        raise ModelError(f"{where} has trained whole modules (modules_to_save)", hint=_MERGE_FIRST)
    return _taken_out(adapted, _shared_parameters(adapted), where)


def _taken_out(adapted: Any, shared: set[int], where: str) -> tuple[Any, dict[nn.Module, Merge]]:  # noqa: ANN401
    from peft.tuners.tuners_utils import BaseTunerLayer  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415

    tuner: Any = adapted.base_model
    layers = {name: each for name, each in tuner.model.named_modules() if isinstance(each, BaseTunerLayer)}
    tuner._check_merge_allowed()
    merges = {}
    for name, each in layers.items():
        if names := _left_to_merge(each, name, where):
            merges[each.get_base_layer()] = _merge_of(each, names, name, shared, where)
    return adapted.unload(), merges


def _left_to_merge(layer: Any, name: str, adapter: str) -> list[str]:  # noqa: ANN401
    """The adapters of a layer that are active and not in its base weight yet."""
    if layer.disable_adapters:
        if layer.merged:
            raise ModelError(
                f"{adapter} is disabled, and merged into {name}", hint="call unmerge_adapter() of the model, or enable it"
            )
        return []
    known = layer._get_available_adapters()
    return [each for each in layer.active_adapters if each in known and each not in layer.merged_adapters]


def is_headless(adapter: Path) -> bool:
    """Whether an adapter was trained on a class without a head, as encoders are."""
    return bool(json.loads((adapter / ADAPTER).read_bytes()).get("task_type") == "FEATURE_EXTRACTION")


def _refuse_kinds(adapter: Path) -> None:
    settings = json.loads((adapter / ADAPTER).read_bytes())
    refused = ("target_parameters", "layer_replication", "lora_bias", "trainable_token_indices", "megatron_config")
    for setting in refused:
        if settings.get(setting):
            raise ModelError(f"{adapter / ADAPTER}: adapters with {setting} cannot be merged here", hint=_MERGE_FIRST)


def _shared_parameters(model: Any) -> set[int]:  # noqa: ANN401
    """Parameters that several modules use, by identity: an adapter around one module must not change the others."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _merge_of(layer: Any, names: list[str], name: str, shared: set[int], adapter: str) -> Merge:  # noqa: ANN401
    base = layer.get_base_layer()
    if not isinstance(getattr(base, "weight", None), Tensor) or isinstance(base, nn.MultiheadAttention):
        raise ModelError(
            f"{adapter} adapts {name} ({type(base).__name__}), which has no single weight to merge", hint=_MERGE_FIRST
        )
    if id(base.weight) in shared:
        raise ModelError(
            f"{adapter} adapts {name}, whose weight is tied to another layer's: a merge would change both", hint=_MERGE_FIRST
        )

    def merge(weight: Tensor) -> Tensor:
        stand_in = copy.copy(base)
        stand_in._parameters = dict(base._parameters) | {"weight": nn.Parameter(weight, requires_grad=False)}
        own = copy.copy(layer)
        own._modules = dict(layer._modules) | {"base_layer": stand_in}
        own.merged_adapters = []
        own._caches = {}  # what DoRA keeps between its own steps
        before = stand_in._parameters.get("bias")
        bias = None if before is None else before.data
        own.merge(safe_merge=True, adapter_names=names)
        after = stand_in._parameters.get("bias")
        if bias is not None and (after is None or after.data_ptr() != bias.data_ptr()):
            raise ModelError(f"{adapter} changes the bias of {name} when it is merged", hint=_MERGE_FIRST)
        merged: Tensor = stand_in.weight.detach()
        return merged

    return merge


def _take_whole_tensors(model: nn.Module, adapter: Path) -> None:
    """Parameters that the adapter stores whole, in its own dtype: peft rounds them to that of the base."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in mapped_tensors([adapter / ADAPTER_WEIGHTS]).items():
        name = key.removeprefix(_BASE).replace(".base_layer.", ".")
        if name in parameters and parameters[name].shape == tensor.shape:
            parameters[name].data = tensor
