"""Load a model as its files store it: mapped, in their dtypes, checked. Remote code runs only when asked for.

transformers constructs the class, renames and converts tensors; it is given the mapped tensors themselves, and casts none of
them. So a tensor that the file has in float32 among bfloat16 ones is still exact, whatever dtype computes later.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from embstore.core.config import Space
from embstore.core.errors import EmbstoreError, ModelError
from embstore.model.adapters import is_headless, with_adapter
from embstore.model.classes import ModelClass, class_of
from embstore.model.dtypes import compute_dtypes, fresh_buffers, set_config_dtype, stored_dtype
from embstore.model.formats import LoadedCheckpoint, Merge
from embstore.model.quantised import plain_tensors
from embstore.model.spilled import conversions_spilled
from embstore.model.weight_files import mapped_tensors

# Tensors that older versions of a library saved and no class reads: tables of angles and masks, which are computed, heads
# that predict further tokens, or a reward.
_HARMLESS = re.compile(
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$|(^|\.)(attn|attention|self)\.(bias|masked_bias)$"
    r"|(^|\.)embeddings\.position_ids$|(^|\.)mtp(_\w+)?\.|^v_head\."
)
# what encoders have behind their hidden states
_HEADS = re.compile(
    r"^(lm_head|lm_loss|final_logits_bias|pred_layer|cls|classifier|score|qa_outputs|pooler|head|decoder|predictions|lm_predictions|mask_predictions|embed_out"
    r"|pre_classifier|vocab_\w+|generator_\w+|discriminator_predictions|pooler\w*|summary|v_head)(\.|$)"
)
_INNER_HEADS = re.compile(r"(^|\.)(pooler|lm_head)\.")  # also of a part of a model


def load_files(
    folder: Path,
    name: str,
    weight_files: Sequence[Path],
    *,
    space: Space,
    tokenizer_folder: Path,
    adapter: Path | None = None,
    trusted: bool = False,
    scratch: Path | None = None,
) -> LoadedCheckpoint:
    """A model folder by transformers, whose own messages are silenced.

    Raises
    ------
    ModelError
        The library cannot load it (its own message is included); tensors are missing, left over, or of another shape.
    """
    with _quiet_transformers():
        tokenizer = load_tokenizer(tokenizer_folder, name, trusted=trusted)
        config = _config(folder, name, trusted=trusted)
        # an adapter uses the layer names of the class on which it was trained, which has a head unless it says otherwise
        asked: Space = space if adapter is None or is_headless(adapter) else "logits"
        try:
            chosen = class_of(config, folder, name, space=asked, trusted=trusted)
            tensors = plain_tensors(mapped_tensors(weight_files), _settings(folder), name, scratch)
            model = _from_tensors(chosen, tensors, name, space=asked, trusted=trusted, scratch=scratch)
        except EmbstoreError:
            raise
        except Exception as error:  # any class's constructor runs here
            message = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(
                f"loading {name} failed: {message[0][:300]}",
                hint=f"check whether transformers.AutoModel.from_pretrained({str(folder)!r}) loads it",
            ) from error
        model.config.name_or_path = str(folder)
        _refuse_other_inputs(model, name, space)
        merges: dict[nn.Module, Merge] = {}
        if adapter is not None:
            model, merges = with_adapter(model, adapter)
    model.requires_grad_(False)
    return LoadedCheckpoint(model=_part_for(model.eval(), space), tokenizer=tokenizer, merges=merges)


def _settings(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "config.json").read_bytes())
    return settings if isinstance(settings, dict) else {}


def _config(folder: Path, name: str, *, trusted: bool) -> Any:  # noqa: ANN401 - transformers is untyped
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # code of the folder may run here
        message = str(error).strip().splitlines() or [type(error).__name__]
        needs_code = "auto_map" in _settings(folder) and not trusted
        raise ModelError(
            f"loading {name} failed: {message[0][:300]}",
            hint="add --trust-remote-code if you trust the code in that folder"
            if needs_code
            else "is it a model of this version of transformers? pip install -U transformers",
        ) from error
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # its tensors are plain by now, or were refused
        rows, pad = getattr(part, "vocab_size", None), getattr(part, "pad_token_id", None)
        if isinstance(pad, int) and isinstance(rows, int) and not 0 <= pad < rows:
            part.pad_token_id = None  # a token added after training: padding is masked, and its row is never looked up
    return config


class _AsStored(Tensor):
    """A tensor of a file, which stays as it is where the library casts it."""

    def to(self, *given: object, **named: object) -> Tensor:
        """The plain tensor where a dtype is asked for; transformers 4 asks for a device before."""
        is_cast = "dtype" in named or any(isinstance(each, torch.dtype) for each in given)
        return self.as_subclass(Tensor) if is_cast else self


def _from_tensors(
    chosen: ModelClass, tensors: dict[str, Tensor], name: str, *, space: Space, trusted: bool, scratch: Path | None
) -> Any:  # noqa: ANN401
    """The class with these tensors, each in its own dtype, and nothing missing, left over, or of another shape."""
    with conversions_spilled(tensors, scratch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, found = chosen.kind.from_pretrained(
            None,
            config=chosen.config,
            state_dict={key: tensor.as_subclass(_AsStored) for key, tensor in tensors.items()},
            dtype=torch.float32,  # of what the class computes itself: no tensor of a file is cast
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **({"trust_remote_code": True} if trusted else {}),
        )
    for module in model.modules():
        for attribute, buffer in module._buffers.items():
            if isinstance(buffer, _AsStored):  # of whole numbers, which transformers 4 does not cast
                module._buffers[attribute] = buffer.as_subclass(Tensor)
    set_config_dtype(model.config, stored_dtype(model))
    _refuse_differences(model, found, tensors, name, space)
    return model


def _refuse_differences(model: Any, found: dict[str, Any], tensors: dict[str, Tensor], name: str, space: Space) -> None:  # noqa: ANN401
    """Refuse a model whose files and class do not have the same tensors; ``found`` is what transformers noticed."""
    kind = type(model).__name__
    if mismatched := sorted(found["mismatched_keys"], key=str):
        # transformers 4 gives names alone
        key = mismatched[0] if isinstance(mismatched[0], str) else mismatched[0][0]
        in_file = tensors[key].shape if key in tensors else mismatched[0][1]
        in_class = model.get_parameter_or_buffer(key).shape
        raise ModelError(
            f"{name}: {key} has the shape {tuple(in_file)} in the weight files and {tuple(in_class)} by config.json "
            f"({len(mismatched)} such tensors)",
            hint="are config.json and the weights of the same model?",
        )
    if missing := sorted(key for key in found["missing_keys"] if not _is_dispensable(key, model, space)):
        # the library fills them with random numbers and goes on
        raise ModelError(
            f"{name}: the weight files lack {len(missing)} tensors of {kind}, such as {missing[0]}",
            hint="is it a causal LM with its head, and is the download complete?",
        )
    if unused := sorted(key for key in found["unexpected_keys"] if not _is_harmless(key, model, space)):
        raise ModelError(
            f"{name}: {kind} does not use {len(unused)} tensors of the weight files, such as {unused[0]}",
            hint="the class of this version of transformers is not the one that was trained; its rows would be wrong",
        )


def _is_dispensable(key: str, model: Any, space: Space) -> bool:  # noqa: ANN401
    """Whether nothing is lost without a tensor: the class computes it, or it lies behind the hidden states.

    Many checkpoints of encoders have no pooler.
    """
    if "Sinusoidal" in type(model.get_submodule(key.rpartition(".")[0])).__name__:
        return True
    is_other_half = getattr(model.config, "is_encoder_decoder", False) and "decoder" in key.split(".")
    return space == "hidden" and (is_other_half or "pooler" in key.split("."))


def _is_harmless(key: str, model: Any, space: Space) -> bool:  # noqa: ANN401
    if _HARMLESS.search(key):
        return True
    text = model.config.get_text_config()
    layer = re.search(r"(^|\.)layers\.(\d+)\.", key)
    predicts_further = bool(getattr(text, "num_nextn_predict_layers", 0))
    if layer is not None and predicts_further and int(layer[2]) >= text.num_hidden_layers:
        return True  # DeepSeek's and GLM's layers that predict further tokens follow those of the model
    if space == "logits":
        return False
    is_elsewhere = not hasattr(model, key.partition(".")[0])
    return _INNER_HEADS.search(key) is not None or (is_elsewhere and _HEADS.search(key) is not None)


def _part_for(model: Any, space: Space) -> Any:  # noqa: ANN401
    """The part that rows are made of: for hidden states the model without its head, of an encoder-decoder the encoder."""
    inner = getattr(model, "language_model", None)
    if isinstance(inner, transformers.PreTrainedModel) and inner.get_output_embeddings() is not None:
        model = inner  # a complete causal LM (Llama 4): the class around it only puts images among its inputs
    if space == "logits":
        return model
    if getattr(model.config, "is_encoder_decoder", False) or type(model).__name__.endswith("EncoderModel"):
        return model.get_encoder()
    return model.model if model.base_model is model and model.get_output_embeddings() is not None else model.base_model


def _refuse_other_inputs(model: Any, name: str, space: Space) -> None:  # noqa: ANN401
    """Refuse classes whose input is not a row of tokens of a table (sound, characters), before anything is run."""
    part = _part_for(model, space)
    try:
        table = part.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        table = None
    if part.main_input_name != "input_ids" or not isinstance(getattr(table, "weight", None), Tensor):
        raise ModelError(
            f"{name}: {type(part).__name__} does not take tokens of a text (it takes {part.main_input_name})",
            hint="give a causal LM, or an encoder of text with --space hidden",
        )


def load_tokenizer(folder: Path, name: str, *, trusted: bool) -> Any:  # noqa: ANN401
    """The tokenizer of a model folder, by transformers; a ModelError if it cannot be read."""
    try:
        with _quiet_transformers():
            found = _tokenizer_class(folder).from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # any class's constructor runs here
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"loading the tokenizer of {name} failed: {message[0][:300]}",
            hint=f"check whether transformers.AutoTokenizer.from_pretrained({str(folder)!r}) loads it",
        ) from error
    if "MistralCommon" in type(found).__name__:
        # where mistral-common is installed transformers prefers it; rows must not depend on what is installed
        if (folder / "tokenizer.json").is_file():
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        raise ModelError(
            f"{folder} has only a tokenizer of mistral-common (tekken.json), which renders chats by other rules",
            hint="add tokenizer.json and tokenizer_config.json, which the model's Hugging Face folder has",
        )
    return found


def _tokenizer_class(folder: Path) -> Any:  # noqa: ANN401
    """Transformers 5 saves tokenizers under a new name of PreTrainedTokenizerFast, which transformers 4 does not know."""
    config = folder / "tokenizer_config.json"
    name = json.loads(config.read_bytes()).get("tokenizer_class") if config.is_file() else None
    is_unknown = name == "TokenizersBackend" and not hasattr(transformers, name)
    return transformers.PreTrainedTokenizerFast if is_unknown else transformers.AutoTokenizer


def whole_in_float32(loaded: LoadedCheckpoint) -> Any:  # noqa: ANN401
    """The model as ``from_pretrained(dtype=torch.float32)`` gives it, adapters merged, in place: to train or compare with.

    Embedding never calls this: it casts a layer at a time (``weights``).
    """
    model = loaded.model
    buffers = fresh_buffers(model, torch.float32)
    for name, dtype in compute_dtypes(model, torch.float32).items():
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), attribute)
        tensor.data = tensor.data.to(dtype)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
    for module, merge in loaded.merges.items():
        weight: Any = module.weight
        weight.data = merge(weight.data)
    return model


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
