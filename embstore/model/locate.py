"""Find and identify a model: a local folder, a hub id, an adapter over one of them, or another format by its prefix.

Identity is content: digests of the weight files, the configuration, the tokenizer files and trusted code, so a resume that
needs no row never loads the model, and a renamed folder is still the same model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embstore.core.config import EmbeddingConfig, Space
from embstore.core.errors import ConfigError, ModelError
from embstore.core.format import canonical_json
from embstore.core.spec import ModelIdentity
from embstore.model.adapters import ADAPTER, ADAPTER_WEIGHTS
from embstore.model.digests import files_sha256
from embstore.model.formats import Checkpoint, LoadedCheckpoint
from embstore.model.hub import download, weight_names
from embstore.model.load import load_files, load_tokenizer
from embstore.model.quantised import refuse_other_methods
from embstore.model.weight_files import check_files

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_MISTRAL_FILE = "tekken.json"

# Other formats than a Hugging Face folder: `locate` of this module reads `--model PREFIX:...`. It is loaded by name, because
# nothing imports an integration.
_FORMATS = {"nanochat": "embstore.integrations.nanochat.checkpoint"}


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
    def tokenizer_folder(self) -> Path:
        """The adapter's own tokenizer where it has one: training may have added tokens."""
        return self.adapter if self.adapter is not None and _tokenizer_files(self.adapter) else self.folder

    @property
    def code_files(self) -> tuple[Path, ...]:
        """Python files that transformers may import from the folder: none unless remote code is trusted and used."""
        if not self.trust_remote_code or "auto_map" not in _settings(self.folder):
            return ()
        return tuple(sorted(self.folder.glob("*.py")))

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files, and of an adapter's."""
        adapter = [] if self.adapter is None else [self.adapter / ADAPTER_WEIGHTS]
        return sum(file.stat().st_size for file in (*self.weight_files, *adapter))

    def identity(self) -> ModelIdentity:
        """Digests of everything that decides a row. Price: one read of the weights, none for the hub's cache."""
        model_config = config = _settings(self.folder)
        weights = list(self.weight_files)
        if self.adapter is not None:
            weights.append(self.adapter / ADAPTER_WEIGHTS)
            # a path is not part of the identity
            config = {"model": config, "adapter": {**_settings(self.adapter, ADAPTER), "base_model_name_or_path": None}}
        return ModelIdentity(
            name=self.name,
            architecture=", ".join(model_config.get("architectures") or ["unknown"]),
            revision=self.revision,
            weights_sha256=files_sha256(weights),
            config_sha256=hashlib.sha256(canonical_json(config).encode()).hexdigest(),
            tokenizer_sha256=files_sha256(_tokenizer_files(self.tokenizer_folder)),
            trust_remote_code=self.trust_remote_code,
            code_sha256=files_sha256(self.code_files) if self.code_files else "",
        )

    def load_tokenizer(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """The tokenizer alone; see ``load_files``."""
        return load_tokenizer(self.tokenizer_folder, self.name, trusted=self.trust_remote_code)

    def load(self, space: Space, scratch: Path | None = None) -> LoadedCheckpoint:
        """The model as its files store it, and the tokenizer; see ``load_files``."""
        return load_files(
            self.folder,
            self.name,
            self.weight_files,
            space=space,
            tokenizer_folder=self.tokenizer_folder,
            adapter=self.adapter,
            trusted=self.trust_remote_code,
            scratch=scratch,
        )


_: type[Checkpoint] = ModelFiles  # mypy compares the class with what is asked of every format


def locate_model(config: EmbeddingConfig) -> Checkpoint:
    """The files of a local folder, or of a hub id (downloaded to the hub's cache when absent).

    Raises
    ------
    ModelError
        There is no such folder or id; it lacks a configuration, a tokenizer or weights; a file is cut off or a Git LFS
        pointer; or its weights are quantised by a method that embstore does not compute.
    """
    if config.model is None:
        raise ConfigError("no model was given", hint="add --model, a folder or a hub id such as org/name")
    prefix, is_prefixed, _ = config.model.partition(":")
    if is_prefixed and prefix in _FORMATS:
        files: Checkpoint = importlib.import_module(_FORMATS[prefix]).locate(
            config.model, trust_pickle=bool(config.trust_tokenizer_pickle)
        )
        return files
    folder = _expanded(config.model)
    looks_local = folder.exists() or config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    if looks_local:
        if not folder.is_dir():
            raise ModelError(f"{config.model} is not a folder", hint="give a model folder or a hub id such as org/name")
        if config.revision is not None:
            raise ConfigError(f"--revision {config.revision} needs a hub id, {config.model} is a local folder")
        name = folder.resolve().name
    else:
        folder, name = download(config.model, config.revision, trusted=bool(config.trust_remote_code)), config.model
    if (folder / ADAPTER).is_file():
        return _with_adapter(folder, name, config)
    return _model_files(folder, name, config)


def _model_files(folder: Path, name: str, config: EmbeddingConfig) -> ModelFiles:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: config.json is missing", hint="give a Hugging Face model folder")
    tokenizer = _tokenizer_files(folder)
    if not tokenizer and (folder / _MISTRAL_FILE).is_file():
        raise ModelError(
            f"{folder} has only a tokenizer of mistral-common ({_MISTRAL_FILE}), which renders chats by other rules",
            hint="add tokenizer.json and tokenizer_config.json of the model's Hugging Face folder",
        )
    if not tokenizer:
        raise ModelError(f"{folder} contains no tokenizer", hint="save the tokenizer in the model's folder")
    names = weight_names(folder)
    if not names:
        raise ModelError(
            f"{folder} contains no weights: neither model.safetensors nor pytorch_model.bin, nor their index",
            hint="is the download complete?",
        )
    if absent := [each for each in names if not (folder / each).is_file()]:
        raise ModelError(
            f"{folder} lacks {len(absent)} of {len(names)} weight files, such as {absent[0]}",
            hint="is the download complete?",
        )
    weights = tuple(folder / each for each in names)
    check_files([folder / "config.json", *tokenizer, *weights])
    refuse_other_methods(_settings(folder), name)
    return ModelFiles(
        folder=folder,
        name=name,
        revision=config.revision,
        weight_files=weights,
        trust_remote_code=bool(config.trust_remote_code),
    )


def _with_adapter(folder: Path, name: str, config: EmbeddingConfig) -> ModelFiles:
    """A PEFT adapter over the base model that it names; a relative path there counts from the adapter's folder."""
    settings = _settings(folder, ADAPTER)
    given = settings.get("base_model_name_or_path")
    if not isinstance(given, str) or not given:
        raise ModelError(f"{folder / ADAPTER} does not name a base model", hint="add base_model_name_or_path to that file")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder} contains no {ADAPTER_WEIGHTS}", hint="save the adapter with safetensors")
    check_files([folder / ADAPTER, folder / ADAPTER_WEIGHTS])
    beside = folder / _expanded(given)
    # the commit that the adapter was trained on, where its configuration names one
    revision = settings.get("revision") if not beside.is_dir() else None
    base = locate_model(
        dataclasses.replace(config, model=str(beside.resolve()) if beside.is_dir() else given, revision=revision or None)
    )
    if not isinstance(base, ModelFiles) or base.adapter is not None:
        raise ModelError(f"{folder} adapts {given}, which is not a Hugging Face model", hint="merge that one first")
    return dataclasses.replace(base, name=name, adapter=folder)


def _expanded(given: str) -> Path:
    """A path as a shell would give it: ``~`` is the home folder, if there is one."""
    try:
        return Path(given).expanduser()
    except RuntimeError:  # a user that does not exist, or no home
        return Path(given)


def _settings(folder: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        settings = json.loads((folder / name).read_bytes())
    except ValueError as error:
        check_files([folder / name])
        raise ModelError(f"{folder / name} is not JSON: {error}", hint="is the download complete?") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / name} is not an object", hint="is the download complete?")
    return settings


def _tokenizer_files(folder: Path) -> list[Path]:
    named = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return [*named, *sorted(folder.glob("*.tiktoken"))]
