"""What a checkpoint offers, in any format: its identity without loading it, and a model as its files store it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from embstore.core.config import Space
from embstore.core.spec import ModelIdentity

Merge = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedCheckpoint:
    """A model on the CPU, each tensor in the dtype of its file, mapped from it; in eval mode, without gradients.

    ``merges`` gives for each module that an adapter changes a function from its weight, already cast to the dtype that
    computes, to the weight with the adapter's change. Buffers that are in no file are as the class made them for the stored
    dtype: ``dtypes.fresh_buffers`` gives those of another one.
    """

    model: Any
    tokenizer: Any
    merges: Mapping[nn.Module, Merge] = field(default_factory=dict)


class Checkpoint(Protocol):
    """A checkpoint that is located and not loaded, in any format; what another loader than ``ModelFiles`` implements.

    Its module is named in ``locate._FORMATS`` and offers ``locate(given, *, trust_pickle)`` for ``PREFIX:...``.
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

    def load_tokenizer(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """The tokenizer alone."""

    def load(self, space: Space, scratch: Path | None = None) -> LoadedCheckpoint:
        """The model (without its head for ``space`` hidden) and its tokenizer.

        ``scratch`` is a folder for weights that must be converted, by default the system's folder for temporary files.
        """
