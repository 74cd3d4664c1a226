"""Find, identify and load a causal LM and its tokenizer. Nothing is unpickled, and remote code runs only when asked for.

Identity is content: digests of the weight files, the configuration and the tokenizer files, so a resume that needs no row
never loads the model, and a renamed folder is still the same model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import torch
import transformers

from embstore.core.config import EmbeddingConfig, Space
from embstore.core.errors import ConfigError, ModelError
from embstore.core.format import canonical_json
from embstore.core.spec import ModelIdentity
from embstore.host.device import resolve_device
from embstore.model.digests import files_sha256

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)


# Other formats than a Hugging Face folder: `locate` of this module reads `--model PREFIX:...`. It is loaded by name, because
# nothing imports an integration.
_FORMATS = {"nanochat": "embstore.integrations.nanochat.checkpoint"}

_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Checkpoint(Protocol):
    """A checkpoint that is located and not loaded, in any format; what another loader than ``ModelFiles`` implements.

    Its module is named in ``_FORMATS`` and offers ``locate(given, *, trust_pickle) -> Checkpoint`` for ``PREFIX:...``.
    The model must offer what ``SplitModel`` asks of a class of transformers: ``config.get_text_config()``, ``base_model``,
    ``get_input_embeddings``, ``get_output_embeddings``, and calls with ``input_ids`` that return ``logits``.
    """

    @property
    def name(self) -> str:
        """For people; contains no path."""

    @property
    def weight_bytes(self) -> int:
        """Size of the files that ``identity`` reads, apart from small ones: for progress."""

    def identity(self) -> ModelIdentity:
        """Digests of everything that decides a row."""

    def load(self, space: Space) -> tuple[Any, Any]:
        """Model in float32 on the CPU (without its head for ``space`` hidden) and tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """A model folder on this machine, checked for the files it must contain."""

    folder: Path
    name: str
    revision: str | None
    weight_files: tuple[Path, ...]
    trust_remote_code: bool
    adapter: Path | None = None  # a PEFT adapter's folder, merged into the weights

    @property
    def use_safetensors(self) -> bool:
        """False only for folders whose weights are all ``.bin``, which load through weights_only."""
        return self.weight_files[0].suffix == ".safetensors"

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's own tokenizer where it has one: training may have added tokens."""
        return self.adapter if self.adapter is not None and _has_tokenizer(self.adapter) else self.folder

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files, and of an adapter's."""
        adapter = [] if self.adapter is None else [self.adapter / _ADAPTER_WEIGHTS]
        return sum(file.stat().st_size for file in (*self.weight_files, *adapter))

    def identity(self) -> ModelIdentity:
        """Digests of everything that decides a row. Price: one read of the weights, 1 to 2 GB/s."""
        config = json.loads((self.folder / "config.json").read_bytes())
        weights = list(self.weight_files)
        if self.adapter is not None:
            weights.append(self.adapter / _ADAPTER_WEIGHTS)
            adapter = json.loads((self.adapter / _ADAPTER).read_bytes())
            config = {
                "model": config,
                "adapter": {**adapter, "base_model_name_or_path": None},
            }  # a path is not part of the identity
        present = [self.tokenizer_folder / name for name in _TOKENIZER_FILES if (self.tokenizer_folder / name).is_file()]
        model_config = config.get("model", config)
        return ModelIdentity(
            name=self.name,
            architecture=", ".join(model_config.get("architectures") or ["unknown"]),
            revision=self.revision,
            weights_sha256=files_sha256(weights),
            config_sha256=hashlib.sha256(canonical_json(config).encode()).hexdigest(),
            tokenizer_sha256=files_sha256(present),
            trust_remote_code=self.trust_remote_code,
        )

    def load(self, space: Space) -> tuple[Any, Any]:
        """Model and tokenizer by transformers, whose own messages are silenced.

        Raises
        ------
        ModelError
            The library cannot load it (its own message is included), or tensors are missing.
        """
        common: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "local_files_only": True}
        with _quiet_transformers():
            try:
                tokenizer = _tokenizer_class(self.tokenizer_folder).from_pretrained(self.tokenizer_folder, **common)
                # an adapter uses the layer names of the model with a head
                headless = space == "hidden" and self.adapter is None
                model_class = transformers.AutoModel if headless else transformers.AutoModelForCausalLM
                model, found = model_class.from_pretrained(
                    self.folder,
                    dtype="auto",
                    use_safetensors=self.use_safetensors,
                    weights_only=True,
                    output_loading_info=True,
                    **common,
                )
            except Exception as error:  # any class's constructor runs here
                message = str(error).strip().splitlines() or [type(error).__name__]
                raise ModelError(
                    f"loading {self.name} failed: {message[0][:300]}",
                    hint=f"check whether AutoModelForCausalLM.from_pretrained({str(self.folder)!r}) loads it",
                ) from error
        # the pooler is a layer after the hidden states, which many checkpoints of encoders do not have
        if missing := sorted(key for key in found["missing_keys"] if space == "logits" or "pooler" not in key.split(".")):
            # the library fills them with random numbers and goes on
            raise ModelError(
                f"{self.name}: the weight files lack {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}",
                hint="is it a causal LM with its head, and is the download complete?",
            )
        if self.adapter is None:
            return model, tokenizer
        try:
            model = _merged(model, self.adapter)
        except (RuntimeError, ValueError, KeyError, Warning) as error:
            raise ModelError(
                f"{self.adapter} does not fit {self.folder}: {str(error).splitlines()[0][:300]}",
                hint="was it trained on this base model?",
            ) from error
        return (model.base_model if space == "hidden" else model), tokenizer


def locate_model(config: EmbeddingConfig) -> Checkpoint:
    """The files of a local folder, or of a hub id (downloaded to the hub's cache when absent).

    Raises
    ------
    ModelError
        There is no such folder or id, or it lacks a configuration, a tokenizer or weights.
    """
    if config.model is None:
        raise ConfigError("no model was given", hint="add --model, a folder or a hub id such as org/name")
    prefix, is_prefixed, _ = config.model.partition(":")
    if is_prefixed and prefix in _FORMATS:
        files: Checkpoint = importlib.import_module(_FORMATS[prefix]).locate(
            config.model, trust_pickle=bool(config.trust_tokenizer_pickle)
        )
        return files
    folder = Path(config.model)
    looks_local = folder.exists() or config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    if looks_local:
        if not folder.is_dir():
            raise ModelError(f"{config.model} is not a folder", hint="give a model folder or a hub id such as org/name")
        if config.revision is not None:
            raise ConfigError(f"--revision {config.revision} needs a hub id, {config.model} is a local folder")
        name = folder.resolve().name
    else:
        folder, name = _download(config.model, config.revision), config.model
    if (folder / _ADAPTER).is_file():
        return _with_adapter(folder, name, config)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: config.json is missing", hint="give a Hugging Face model folder")
    if not _has_tokenizer(folder):
        raise ModelError(f"{folder} contains no tokenizer", hint="save the tokenizer in the model's folder")
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise ModelError(
            f"{folder} contains no weights: neither *.safetensors nor pytorch_model*.bin", hint="is the download complete?"
        )
    return ModelFiles(
        folder=folder,
        name=name,
        revision=config.revision,
        weight_files=tuple(weights),
        trust_remote_code=bool(config.trust_remote_code),
    )


def _with_adapter(folder: Path, name: str, config: EmbeddingConfig) -> ModelFiles:
    """A PEFT adapter over the base model that it names; a relative path there counts from the adapter's folder."""
    given = json.loads((folder / _ADAPTER).read_bytes()).get("base_model_name_or_path")
    if not isinstance(given, str) or not given:
        raise ModelError(f"{folder / _ADAPTER} does not name a base model", hint="add base_model_name_or_path to that file")
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder} contains no {_ADAPTER_WEIGHTS}", hint="save the adapter with safetensors")
    beside = folder / given
    base = locate_model(
        dataclasses.replace(config, model=str(beside.resolve()) if beside.is_dir() else given, revision=None)
    )
    if not isinstance(base, ModelFiles) or base.adapter is not None:
        raise ModelError(f"{folder} adapts {given}, which is not a Hugging Face model", hint="merge that one first")
    return dataclasses.replace(base, name=name, adapter=folder)


def _merged(model: Any, adapter: Path) -> Any:  # noqa: ANN401
    """The model with the adapter's changes added to its weights, in float32."""
    try:
        import peft  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ModelError(
            f"{adapter} is a PEFT adapter, and peft is not installed", hint="pip install 'embstore[peft]'"
        ) from error
    with warnings.catch_warnings():
        # otherwise an adapter of another model changes nothing, silently
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=False).merge_and_unload(safe_merge=True)


def _tokenizer_class(folder: Path) -> Any:  # noqa: ANN401
    """Transformers 5 saves tokenizers under a new name of PreTrainedTokenizerFast, which transformers 4 does not know."""
    config = folder / "tokenizer_config.json"
    name = json.loads(config.read_bytes()).get("tokenizer_class") if config.is_file() else None
    is_unknown = name == "TokenizersBackend" and not hasattr(transformers, name)
    return transformers.PreTrainedTokenizerFast if is_unknown else transformers.AutoTokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """Model in float32 eval mode on ``device``, its tokenizer, and the longest input it takes (None: no limit known)."""

    model: Any
    tokenizer: Any
    device: torch.device
    max_positions: int | None
    merges: Mapping[Any, Callable[[torch.Tensor], torch.Tensor]] = dataclasses.field(default_factory=dict)


def load_model(files: Checkpoint, device: str, *, space: Space = "logits") -> LoadedModel:
    """Load weights in float32 and the tokenizer.

    Raises
    ------
    ModelError
        The library cannot load it (its own message is included), or tensors are missing.
    """
    target = resolve_device(device)
    model, tokenizer = files.load(space)
    return _ready(model, tokenizer, target)


def as_loaded(model: Any, tokenizer: Any, device: str) -> LoadedModel:  # noqa: ANN401
    """A model in memory as ``load_model`` would give it; it is moved and frozen in place."""
    return _ready(model, tokenizer, resolve_device(device))


def _ready(model: Any, tokenizer: Any, target: torch.device) -> LoadedModel:  # noqa: ANN401
    model.eval()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return LoadedModel(model=model, tokenizer=tokenizer, device=target, max_positions=positions)


def _download(model: str, revision: str | None) -> Path:
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
        if not list(folder.glob("*.safetensors")):
            patterns.append("pytorch_model*.bin")
            folder = Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises errors of three libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{model} is not a local folder, and the hub answered: {reason[0][:200]}", hint="check the path or the id"
        ) from error
    return folder


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
