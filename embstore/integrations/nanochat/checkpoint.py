"""nanochat's own checkpoints: ``--model nanochat:SOURCE[:TAG[:STEP]]``.

A checkpoint is ``model_<step>.pt`` (a state dict) and ``meta_<step>.json`` under ``$NANOCHAT_BASE_DIR`` (by default
``~/.cache/nanochat``); the tokenizer is in a folder next to the checkpoints. Checkpoints of the first generation (until
January 2026) are mapped onto the NanoChat class of transformers. The mapping is exact: the class has a place for every
tensor and knows every field of the configuration; later commits changed constants that no checkpoint file records. Models of
later generations (value embeddings, sliding windows, residual scales) are built with an installed nanochat (``package``),
and refused if none is installed. Weights load with ``weights_only``. A pickled tokenizer can run any code, so it is opened
only if the user allows it.

Mapped weights stay as they are stored, with float32 rotary tables and norms; nanochat itself rounds its tables to bfloat16.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import TikTokenConverter

from embstore.core.config import Space
from embstore.core.decode import words_of
from embstore.core.errors import ModelError
from embstore.core.format import canonical_json
from embstore.core.spec import ModelIdentity
from embstore.integrations.nanochat.package import NanochatPackage, find_package
from embstore.model.digests import files_sha256
from embstore.model.formats import Checkpoint, LoadedCheckpoint

PREFIX = "nanochat:"
_FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
_COMPILED = "_orig_mod."  # what torch.compile puts before every name
_BOS = "<|bos|>"
_SOFT_CAP = 15.0
_VOCABULARY_MULTIPLE = 64  # since December 2025
# model_config of meta_<step>.json -> NanoChatConfig
_SETTINGS = {
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
}
_TENSORS = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
_LAYER_TENSORS = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# how nanochat renders a conversation; the tokens are special ones of its tokenizer
_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{% set r = 'assistant' if m['role'] == 'assistant' else 'user' %}"
    "{{ '<|' + r + '_start|>' + m['content'] + '<|' + r + '_end|>' }}{% endfor %}"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NanochatFiles:
    """One checkpoint of nanochat and its tokenizer; ``trust_pickle`` allows ``tokenizer.pkl``."""

    name: str
    weights: Path
    meta: Path
    tokenizer: Path
    trust_pickle: bool

    @property
    def weight_bytes(self) -> int:
        """Size of the weights' file."""
        return self.weights.stat().st_size

    def identity(self) -> ModelIdentity:
        """Digests of weights, the model's configuration, the tokenizer, and the installed nanochat where that is needed."""
        settings = self._settings()
        package = self._package_for(settings, self._state())
        config = settings if package is None else {"model_config": settings, "nanochat": package.sha256()}
        return ModelIdentity(
            name=self.name,
            architecture="NanoChatForCausalLM" if package is None else "nanochat.gpt.GPT",
            revision=None,
            weights_sha256=files_sha256([self.weights]),
            config_sha256=hashlib.sha256(canonical_json(config).encode()).hexdigest(),
            tokenizer_sha256=files_sha256([self.tokenizer]),
            trust_remote_code=False,
        )

    def load(self, space: Space, scratch: Path | None = None) -> LoadedCheckpoint:
        """Model (without its head for ``space`` hidden) and tokenizer.

        Tensors mapped onto transformers' class stay as they are stored; a model of the package's own is in float32.

        Raises
        ------
        ModelError
            The checkpoint is not a state dict, has tensors or settings that neither transformers' class nor an installed
            nanochat knows, or lacks some, or the tokenizer cannot be read.
        """
        settings, state = self._settings(), self._state()
        package = self._package_for(settings, state)
        whole: Any = self._mapped(settings, state) if package is None else package.build(settings, state, name=self.name)
        model = whole.base_model if space == "hidden" else whole
        return LoadedCheckpoint(model=model.eval().requires_grad_(False), tokenizer=self.load_tokenizer())

    def _mapped(self, settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Any:  # noqa: ANN401
        """The class of transformers with these weights."""
        config = transformers.NanoChatConfig(
            **{_SETTINGS[name]: value for name, value in settings.items()},
            intermediate_size=state["transformer.h.0.mlp.c_fc.weight"].shape[0],
            final_logit_softcapping=_SOFT_CAP,
            rms_norm_eps=torch.finfo(torch.float32).eps,  # what torch's rms_norm takes when it is given none
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            model = transformers.NanoChatForCausalLM(config)
        renamed = _names(settings["n_layer"])
        columns = settings["vocab_size"]
        padded = -(-columns // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        weights = {
            # rows that only pad the vocabulary: no token looks them up, and nanochat cuts their logits off
            renamed[name]: tensor[:columns] if name in _TENSORS and len(tensor) == padded else tensor
            for name, tensor in state.items()
        }
        try:
            model.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            raise ModelError(
                f"{self.weights} does not fit {self.meta.name}: {words_of(str(error).splitlines()[-1])}"
            ) from error
        # the rotary frequencies are not among the weights: they were made on the meta device
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        return model

    def _settings(self) -> dict[str, Any]:
        try:
            settings = json.loads(self.meta.read_bytes())["model_config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{self.meta} lacks a model_config", hint="copy it again from the machine that trained the model"
            ) from error
        if not isinstance(settings, dict) or not isinstance(settings.get("n_layer"), int):
            raise ModelError(
                f"{self.meta}: model_config has no n_layer", hint="copy it again from the machine that trained the model"
            )
        return settings

    def _state(self) -> dict[str, torch.Tensor]:
        """Every tensor by nanochat's own name; mapped, not read."""
        try:
            state = torch.load(self.weights, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{self.weights} cannot be read: it contains more than tensors, which could run code",
                hint="save its state dict alone, where you trust it",
            ) from error
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise ModelError(f"{self.weights} cannot be read: {words_of(error)}", hint="is the copy complete?") from error
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ModelError(f"{self.weights} is not a state dict", hint="give the folder that nanochat wrote")
        return {name.removeprefix(_COMPILED): tensor for name, tensor in state.items()}

    def _package_for(self, settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> NanochatPackage | None:
        """None where transformers' class can represent the model exactly, else the installed package."""
        problem = _unmapped(settings, state)
        package = None if problem is None else find_package()
        if problem is not None and package is None:
            raise ModelError(
                f"{self.name} needs nanochat's own code ({problem}), and nanochat is not installed",
                hint="clone https://github.com/karpathy/nanochat at the commit that trained it and put that folder on "
                "PYTHONPATH; or convert the model to a Hugging Face folder and give that",
            )
        return package

    def load_tokenizer(self) -> Any:  # noqa: ANN401
        """A fast Hugging Face tokenizer that prepends <|bos|> and renders chats as nanochat does; errors as of ``load``."""
        if self.tokenizer.suffix == ".json":
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(self.tokenizer), bos_token=_BOS)
        else:
            tokenizer = _from_tiktoken(self._unpickled())
        bos = tokenizer.convert_tokens_to_ids(_BOS)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, bos)])
        tokenizer.chat_template = _TEMPLATE
        return tokenizer

    def _unpickled(self) -> Any:  # noqa: ANN401
        if not self.trust_pickle:
            raise ModelError(
                f"{self.tokenizer} is a pickle, and opening a pickle runs the code in it",
                hint="if you made it yourself, add --trust-tokenizer-pickle; or put a tokenizer.json (Hugging Face "
                f"tokenizers format) into {self.tokenizer.parent}",
            )
        try:
            with self.tokenizer.open("rb") as file:
                return pickle.load(file)  # the user said so
        except ModuleNotFoundError as error:
            raise ModelError(
                f"{self.tokenizer} needs the package {error.name}, which is not installed", hint=f"pip install {error.name}"
            ) from error


_: type[Checkpoint] = NanochatFiles  # mypy compares the class with what the loader asks for


def locate(given: str, *, trust_pickle: bool) -> NanochatFiles:
    """The checkpoint that ``nanochat:SOURCE[:TAG[:STEP]]`` means; by default the deepest tag (d20, not d12) and last step.

    Raises
    ------
    ModelError
        The source, tag, step or tokenizer does not exist.
    """
    source, tag, step = ([*given.removeprefix(PREFIX).split(":"), "", ""])[:3]
    if source not in _FOLDERS or given.count(":") > 3:
        raise ModelError(
            f"{given}: nanochat has the sources {', '.join(_FOLDERS)}", hint="write nanochat:SOURCE[:TAG[:STEP]]"
        )
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    root = base / _FOLDERS[source]
    tags = sorted((folder.name for folder in root.glob("*") if folder.is_dir()), key=_depth) if root.is_dir() else []
    if not tags or (tag and tag not in tags):
        raise ModelError(
            f"{root} does not contain checkpoint {tag or 'folders'}; it contains: {', '.join(tags) or 'none'}",
            hint="set NANOCHAT_BASE_DIR to the folder that contains base_checkpoints",
        )
    folder = root / (tag or tags[-1])
    steps = sorted(int(found[1]) for path in folder.iterdir() if (found := re.fullmatch(r"model_(\d+)\.pt", path.name)))
    if not steps or (step and (not step.isdigit() or int(step) not in steps)):
        shown = ", ".join(map(str, steps[-5:])) or "none"
        raise ModelError(f"{folder} does not contain step {step or 'files'}; the last are: {shown}")
    number = f"{int(step) if step else steps[-1]:06d}"
    meta = folder / f"meta_{number}.json"
    if not meta.is_file():
        raise ModelError(f"{meta} is missing", hint="nanochat writes it next to the model file; copy it too")
    present = [path for name in ("tokenizer.json", "tokenizer.pkl") if (path := base / "tokenizer" / name).is_file()]
    if not present:
        raise ModelError(f"{base / 'tokenizer'} lacks a tokenizer", hint="copy tokenizer.json or tokenizer.pkl there")
    return NanochatFiles(
        name=f"{PREFIX}{source}:{folder.name}:{int(number)}",
        weights=folder / f"model_{number}.pt",
        meta=meta,
        tokenizer=present[0],
        trust_pickle=trust_pickle,
    )


def _depth(tag: str) -> tuple[int, str]:
    found = re.fullmatch(r"d(\d+)", tag)
    return (int(found[1]) if found else -1, tag)


def _unmapped(settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> str | None:
    """The first setting or tensor that keeps a model from being transformers' NanoChat, None where nothing does."""
    if not hasattr(transformers, "NanoChatForCausalLM"):
        return f"transformers {transformers.__version__} does not have a NanoChat class"
    known_tensors = set(_names(settings["n_layer"]))
    for what, found, known in (("setting", set(settings), set(_SETTINGS)), ("tensor", set(state), known_tensors)):
        for names, problem in (
            (found - known, "which transformers' NanoChat class does not know"),
            (known - found, "which is missing"),
        ):
            if names:
                return f"{what} {min(names)}, {problem} ({len(names)} in total)"
    return None


def _names(num_layers: int) -> dict[str, str]:
    """Every tensor of a model with that many layers, and its name in transformers."""
    layers = {
        f"transformer.h.{layer}.{old}.weight": f"model.layers.{layer}.{new}.weight"
        for layer in range(num_layers)
        for old, new in _LAYER_TENSORS.items()
    }
    return _TENSORS | layers


def _from_tiktoken(encoding: Any) -> Any:  # noqa: ANN401
    """A Hugging Face tokenizer with the ranks, pattern and special tokens of a tiktoken Encoding."""
    specials = sorted(encoding._special_tokens, key=encoding._special_tokens.get)
    converter = TikTokenConverter(vocab_file="", pattern=encoding._pat_str, extra_special_tokens=specials)
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # they are here already, in no file
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token=_BOS)
    if tokenizer.get_added_vocab() != encoding._special_tokens:
        raise ModelError(
            f"special tokens of the pickled tokenizer do not follow its {len(encoding._mergeable_ranks)} others"
        )
    return tokenizer
