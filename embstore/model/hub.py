"""Model folders of the hub: only what is used is downloaded, all of one commit; a cached folder needs no network."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub

from embstore.core.decode import words_of
from embstore.core.errors import ModelError

_SETTINGS = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "vocab.bpe", "adapter_model.safetensors")
# other formats of the same weights, and folders of optional extras: none of it is read
_LEFT_OUT = ("*/*", "consolidated*", "*.index.fp*.json")


def download(model: str, revision: str | None, *, trusted: bool) -> Path:
    """The folder of a hub id in the hub's cache: settings, tokenizer and weights; code too if it is trusted.

    Raises
    ------
    ModelError
        The hub does not have it or cannot be reached, and the cache does not have it either.
    """
    code = ("*.py",) if trusted else ()
    folder = _snapshot(model, revision, (*_SETTINGS, *code))
    wanted = [name for name in weight_names(folder) if not (folder / name).is_file()]
    if not weight_names(folder) and not (folder / "adapter_config.json").is_file():
        wanted = ["model.safetensors"]
    if wanted:
        # the commit that was found above: nothing is mixed if the model changes meanwhile
        folder = _snapshot(model, folder.name, wanted)
    if wanted == ["model.safetensors"] and not (folder / wanted[0]).is_file():
        folder = _snapshot(model, folder.name, ("pytorch_model.bin",))
    for repository in _repositories_of_code(folder) if trusted else ():
        _snapshot(repository, None, code)
    return folder


def weight_names(folder: Path) -> list[str]:
    """Names of the weight files that transformers reads from a folder, present or named by an index; safetensors first."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if (folder / f"{stem}.{suffix}").is_file():
            return [f"{stem}.{suffix}"]
        if index.is_file():
            try:
                return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{index} is not an index of weight files", hint="is the download complete?") from error
    return []


def _repositories_of_code(folder: Path) -> list[str]:
    """Other repositories from which ``config.json`` takes classes."""
    try:
        found = json.loads((folder / "config.json").read_bytes()).get("auto_map") or {}
    except (OSError, ValueError, AttributeError):
        return []
    references = [each for value in found.values() for each in (value if isinstance(value, list) else [value]) if each]
    return sorted({reference.partition("--")[0] for reference in references if "--" in reference})


def _snapshot(model: str, revision: str | None, patterns: tuple[str, ...] | list[str]) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_LEFT_OUT)
            )
        )
    except Exception as error:  # the hub client raises errors of three libraries
        raise ModelError(
            f"{model} is not a local folder, and the hub answered: {words_of(error)}", hint="check the path or the id"
        ) from error
