"""embstore: offline embedding and density store for LLM post-training.

The public names are lazy (PEP 562): ``embstore.training`` must import numpy only, and Python runs this file first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from embstore.flow.array_import import import_array
    from embstore.flow.artifact import recompute_weights
    from embstore.flow.build import BuildReport, build
    from embstore.flow.online import DensityAwareSampler
    from embstore.flow.stored_weights import drop_weights, list_weights
    from embstore.storage.reader import EmbeddingStore, open_store
    from embstore.views.comparison import compare
    from embstore.views.export import export_store
    from embstore.views.info import inspect, verify

_HOMES = {
    "BuildReport": "embstore.flow.build",
    "DensityAwareSampler": "embstore.flow.online",
    "EmbeddingStore": "embstore.storage.reader",
    "build": "embstore.flow.build",
    "compare": "embstore.views.comparison",
    "drop_weights": "embstore.flow.stored_weights",
    "export_store": "embstore.views.export",
    "import_array": "embstore.flow.array_import",
    "inspect": "embstore.views.info",
    "list_weights": "embstore.flow.stored_weights",
    "open_store": "embstore.storage.reader",
    "recompute_weights": "embstore.flow.artifact",
    "verify": "embstore.views.info",
}

__all__ = [
    "BuildReport",
    "DensityAwareSampler",
    "EmbeddingStore",
    "__version__",
    "build",
    "compare",
    "drop_weights",
    "export_store",
    "import_array",
    "inspect",
    "list_weights",
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
