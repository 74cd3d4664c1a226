"""A folder that the original offline script wrote: weights by position, and the texts or ids of their prompts.

It has no manifest that says which weights belong to which prompts, and its formula favours prompts in crowds.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embstore.core.errors import WeightsError
from embstore.core.files import storage_errors
from embstore.core.format import IDS, JOURNAL, MANIFEST, METADATA_LINK, PROMPTS_LIST, WEIGHTS_LINK
from embstore.core.prompts import collapse_whitespace
from embstore.training import load_weights
from scripts.kat_files import PromptLine
from scripts.kat_hints import COMPUTE

_AGAIN = f"compute the weights again: {COMPUTE} --output_dir OTHER_FOLDER"
_INVERTED = (
    "is of the original script: its weights are 1 / mean distance, so prompts in crowds are drawn more, rare ones less"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """``weight_of`` maps texts of prompts (whitespace collapsed, equal ones added up), or their ids if ``is_by_id``."""

    weight_of: Mapping[str, float]
    is_by_id: bool
    notice: str

    def name_of(self, line: PromptLine) -> str:
        """The text or id of the line's prompt in ``weight_of``, or empty."""
        prompt = line.prompt
        # the first user message is all that the original kept of a pair's prompt
        is_its_text = line.is_pair or prompt.messages is None or [each["role"] for each in prompt.messages] == ["user"]
        if self.is_by_id:
            names = [line.given_id or "", prompt.derived_id if is_its_text else ""]
        else:
            names = [collapse_whitespace(prompt.rendered), line.first_user_text if is_its_text else ""]
        return next((name for name in names if name in self.weight_of), "")


def is_original(folder: Path) -> bool:
    """Whether the folder has weights, but neither a manifest nor a journal."""
    return (folder / WEIGHTS_LINK).is_file() and not any(os.path.lexists(folder / name) for name in (MANIFEST, JOURNAL))


def read_original(folder: Path) -> Original:
    """The weights of a folder that ``is_original``.

    Raises
    ------
    WeightsError
        They are not valid weights, or it is not known which prompts they belong to.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is a bare file")  # the texts say what it belongs to
        weights_N = load_weights(folder / WEIGHTS_LINK).array.astype(np.float64)
    is_by_id = not (folder / PROMPTS_LIST).is_file()
    source = folder / (IDS if is_by_id else PROMPTS_LIST)
    names = _read_json(source)
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise WeightsError(f"{source} is not a list of texts", hint=_AGAIN)
    metadata = _read_json(folder / METADATA_LINK)
    direction = metadata.get("direction") if isinstance(metadata, dict) else None
    counted = metadata.get("n_prompts", metadata.get("n_items")) if isinstance(metadata, dict) else None
    if not len(weights_N) == len(names) == (len(names) if counted is None else counted):
        raise WeightsError(
            f"{folder} has {len(weights_N)} weights and {len(names)} prompts in {source.name}; the metadata say {counted}: "
            "the original leaves out batches that fail, so it is not known whose weight is whose",
            hint=_AGAIN,
        )
    keys = [str(name) if is_by_id else collapse_whitespace(str(name)) for name in names]
    weight_of: dict[str, float] = {}
    for key, weight in zip(keys, weights_N.tolist(), strict=True):
        weight_of[key] = weight_of.get(key, 0.0) + weight
    if is_by_id:  # an id of several prompts tells none of them
        weight_of = {key: weight_of[key] for key, count in Counter(keys).items() if count == 1}
    joined = f"joined by the {'ids' if is_by_id else 'texts'} of {source.name}"
    formula = f"{folder} is not a store; its metadata say: {direction}" if direction else f"{folder} {_INVERTED}"
    advice = "" if direction else f". For the opposite, {_AGAIN}"
    return Original(weight_of=weight_of, is_by_id=is_by_id, notice=f"note: {formula}; {joined}{advice}")


def _read_json(path: Path) -> Any:  # noqa: ANN401
    with storage_errors("reading", path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error})", hint=_AGAIN) from error
