"""Weights without a store: the offline pass at training start, for given prompts and a model that is already loaded.

This is the original ``DensityAwareSampler`` on top of ``build``: masked means, audited neighbours, larger weights for
rare prompts. It costs as much as a build at every start; ``embstore build`` pays once.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import BuildConfig, EmbeddingConfig, WeightingConfig
from embstore.core.events import Observer, ignore
from embstore.flow.build import build
from embstore.storage.reader import open_store

if TYPE_CHECKING:
    import torch


class DensityAwareSampler:
    """Sampling weights of prompts, computed by the constructor.

    Parameters
    ----------
    prompts
        Texts, none of them blank. Equal ones share one weight.
    base_model, tokenizer
        A causal LM of transformers, also under DDP, and its tokenizer. The model is not changed. What its active PEFT
        adapters add counts. Layers are copied where the pass has another dtype. FSDP and ZeRO-3 leave a process only parts
        of a model, and are refused.
    device
        Device of the pass.
    k
        Number of nearest distinct prompts whose mean distance is a prompt's rarity, at most 32.
    observer
        Called with ``core.events`` during the build.

    Attributes
    ----------
    density_weights
        float64 [len(prompts)], sum 1.

    Raises
    ------
    EmbstoreError
        See core.errors. A temporary folder holds the rows: two bytes per prompt and column of the logits.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        base_model: torch.nn.Module,
        tokenizer: Any,  # noqa: ANN401 - transformers is untyped
        device: torch.device | str = "auto",
        k: int = 10,
        *,
        observer: Observer = ignore,
    ) -> None:
        import torch  # noqa: PLC0415 - the caller has a model, so it is loaded

        from embstore.model.source import InMemorySource  # noqa: PLC0415

        threads = torch.get_num_threads()  # those that the training process has
        config = BuildConfig(
            embedding=EmbeddingConfig(device=str(device), threads=threads),
            weighting=WeightingConfig(k=k),
            strict=True,
        )
        with tempfile.TemporaryDirectory(prefix="embstore-online-") as scratch:
            file, out = Path(scratch) / "prompts.jsonl", Path(scratch) / "store"
            file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts), encoding="utf-8")
            build(file, out=out, config=config, observer=observer, source=InMemorySource(base_model, tokenizer))
            store = open_store(out)
            rows_L = np.asarray(store.line_rows)
            weights_L: NDArray[np.float64] = store.weights[rows_L].astype(np.float64) / store.multiplicity[rows_L]
        self.density_weights = weights_L
