"""embstore: offline embedding and density store for LLM post-training.

The public names are lazy (PEP 562): ``embstore.training`` must import numpy only, and Python runs this file first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from embstore.artifact import recompute_weights
    from embstore.comparison import compare
    from embstore.export import export_store
    from embstore.importing import import_array
    from embstore.info import inspect, verify
    from embstore.online import DensityAwareSampler
    from embstore.pipeline import BuildReport, build
    from embstore.storage.store import EmbeddingStore, open_store

_HOMES = {
    "BuildReport": "embstore.pipeline",
    "DensityAwareSampler": "embstore.online",
    "EmbeddingStore": "embstore.storage.store",
    "build": "embstore.pipeline",
    "compare": "embstore.comparison",
    "export_store": "embstore.export",
    "import_array": "embstore.importing",
    "inspect": "embstore.info",
    "open_store": "embstore.storage.store",
    "recompute_weights": "embstore.artifact",
    "verify": "embstore.info",
}

__all__ = [
    "BuildReport",
    "DensityAwareSampler",
    "EmbeddingStore",
    "__version__",
    "build",
    "compare",
    "export_store",
    "import_array",
    "inspect",
    "open_store",
    "recompute_weights",
    "verify",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - each name has its own type
    if name not in _HOMES:
        raise AttributeError(f"module 'embstore' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
