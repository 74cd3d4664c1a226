"""What a training run imports: map the weights of a finished store, validate them fully, draw prompts. numpy only.

Importing costs little more than numpy; mapping and validating a million weights takes milliseconds, so everything is checked
by default. The map is read-only, and all ranks on a node share it through the page cache.

    weights = load_weights("STORE").for_dataset(dataset)
    loader = DataLoader(dataset, batch_size=32, sampler=DensitySampler(weights, seed=0))

``docs/training.md`` is the guide. ``embstore.training.torch`` has the same sampler as a ``torch.utils.data.Sampler``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from embstore.training.group_repeat import GroupRepeat
from embstore.training.sampler import DensitySampler
from embstore.training.weights import Weights, load_weights

if TYPE_CHECKING:
    from embstore.training.file_resampling import resample_file
    from embstore.training.join import prompt_keys
    from embstore.training.resample import IndexedView, importance_weights, resample_dataset, resample_indices

# rarely used names are imported on first use
_HOMES = {
    "IndexedView": "embstore.training.resample",
    "importance_weights": "embstore.training.resample",
    "prompt_keys": "embstore.training.join",
    "resample_dataset": "embstore.training.resample",
    "resample_file": "embstore.training.file_resampling",
    "resample_indices": "embstore.training.resample",
}

__all__ = [
    "DensitySampler",
    "GroupRepeat",
    "IndexedView",
    "Weights",
    "importance_weights",
    "load_weights",
    "prompt_keys",
    "resample_dataset",
    "resample_file",
    "resample_indices",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - each name has its own type
    if name not in _HOMES:
        raise AttributeError(f"module 'embstore.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
