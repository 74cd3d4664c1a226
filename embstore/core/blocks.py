"""What a long search may keep between runs: named blocks of arrays. Kept or not, the result is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]


class BlockStore(Protocol):
    """Keeps blocks for the next run; a damaged or missing one is None, never wrong."""

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays kept under ``name``."""

    def save(self, name: str, arrays: Arrays) -> None:
        """Keep arrays under ``name``, in place of what was there."""


class NothingKept:
    """For searches that take seconds."""

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """As ``BlockStore``."""
        return None

    def save(self, name: str, arrays: Arrays) -> None:
        """As ``BlockStore``."""
