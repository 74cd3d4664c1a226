"""Which class of transformers computes a checkpoint's rows: a causal LM, a multimodal one given text, or an encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import _get_model_class

from embstore.core.config import Space
from embstore.core.errors import ModelError

# in this order where config.json names none of their classes
_WITH_LOGITS = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


# classes whose rows would be wrong, or depend on more than their prompt
_REFUSED = {
    "reformer": "its attention draws random hashes, so two runs give different rows",
    "funnel": "it pools neighbouring tokens, padding included, so a row would depend on the other prompts of its batch",
    "rwkv": "it rescales its weights in place while it runs, and embstore computes with copies that it makes later",
    "cpmant": "it looks at padding, so a row would depend on the other prompts of its batch",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelClass:
    """A class and the configuration it takes: for a text-only class of a multimodal checkpoint the text part."""

    kind: Any
    config: Any


def class_of(config: Any, folder: Path, name: str, *, space: Space, trusted: bool) -> ModelClass:  # noqa: ANN401
    """The class for a configuration that ``AutoConfig`` has read; in space "hidden" one without a head where there is one.

    Raises
    ------
    ModelError
        An encoder-decoder was asked for logits, or no class of transformers gives what was asked.
    """
    if space == "logits" and getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder ({config.model_type}): its logits are of an answer, not of the prompt",
            hint="add --space hidden, which pools the states of its encoder",
        )
    if reason := _REFUSED.get(config.model_type):
        raise ModelError(f"{name} ({config.model_type}) cannot be used: {reason}", hint="give another model")
    _attend_to_all(config)
    autos = _WITH_LOGITS if space == "logits" else _hidden_autos(config)
    for auto in autos:
        reference = getattr(config, "auto_map", None) or {}
        if trusted and auto in reference and not _is_registered(config, auto):
            kind = get_class_from_dynamic_module(reference[auto], folder, local_files_only=True)
            kind.register_for_auto_class(auto_class=auto)
            return ModelClass(kind=kind, config=config)
    known = [(auto, kind) for auto in autos for kind in _classes(config, auto)]
    named = getattr(config, "architectures", None) or ()
    chosen = next((kind for _, kind in known if kind.__name__ in named), None)
    if chosen is None and known:
        chosen = _get_model_class(config, getattr(transformers, known[0][0])._model_mapping)
    if chosen is None:
        what = "no class that gives logits of a text" if space == "logits" else "no class without a head"
        raise ModelError(
            f"{name} ({config.model_type}, {', '.join(named) or 'no architecture named'}): transformers has {what} for it",
            hint="give a causal LM, or an encoder with --space hidden",
        )
    text = getattr(type(config), "sub_configs", {}).get("text_config")
    is_text_only = text is not None and getattr(chosen, "config_class", None) is text
    return ModelClass(kind=chosen, config=config.get_text_config() if is_text_only else config)


def _attend_to_all(config: Any) -> None:  # noqa: ANN401
    """BigBird takes full attention for short batches; it is asked for, so that no batch is long enough for the sparse one.

    ``positions.usable_positions`` limits prompts to what the class itself calls short.
    """
    if getattr(config, "attention_type", None) == "block_sparse":
        config.attention_type = "original_full"


def _hidden_autos(config: Any) -> tuple[str, ...]:  # noqa: ANN401
    """An encoder's own class where its checkpoint may lack the decoder (T5), else the model without a head."""
    named = getattr(config, "architectures", None) or ()
    is_half = getattr(config, "is_encoder_decoder", False) or any(each.endswith("EncoderModel") for each in named)
    return ("AutoModelForTextEncoding", "AutoModel") if is_half else ("AutoModel",)


def _classes(config: Any, auto: str) -> Iterator[Any]:  # noqa: ANN401
    mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
    if type(config) in mapping:
        found = mapping[type(config)]
        yield from found if isinstance(found, (list, tuple)) else (found,)


def _is_registered(config: Any, auto: str) -> bool:  # noqa: ANN401
    """Whether the caller's process registered another class for this configuration, which is preferred to the folder's."""
    return any(not kind.__module__.startswith("transformers") for kind in _classes(config, auto))
