"""Density sampling in NeMo-RL, by configuration: a dataset of the drawn prompts, in order.

    data.train.dataset_name=embstore.integrations.nemo_rl.DensityDataset data.shuffle=false
    +data.train.density.store=STORE +data.train.density.num_samples=DRAWS +data.train.density.no_repeat_within=PROMPTS

DRAWS are those of the whole run, because NeMo-RL reads the dataset again in the same order; PROMPTS is
``grpo.num_prompts_per_step``, because it puts equal prompts of a step into one group. ``density`` takes the options of
``StoreSampler``; the other settings are those of NeMo-RL's ``ResponseDataset`` (read at commit 7ea279a).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl.data.datasets.response_datasets.response_dataset import ResponseDataset

from embstore.integrations.sampler import StoreSampler, configured


class DensityDataset(ResponseDataset):  # type: ignore[misc]  # NeMo-RL is not installed where types are checked
    """NeMo-RL's dataset of prompts and answers, resampled. The validation set is not.

    Rows are joined by the chat without its last answer, or by ``density.key_column`` or ``id_column``.

    Parameters
    ----------
    density
        Options of ``StoreSampler``: the store, and how to join and draw.
    settings
        Those of ``ResponseDataset``.
    """

    dataset: Any

    def __init__(self, density: Mapping[str, Any] | None = None, **settings: Any) -> None:  # noqa: ANN401 - NeMo-RL's
        super().__init__(**settings)
        options = configured({"density": density})
        if "no_repeat_within" not in options:
            warnings.warn(
                "NeMo-RL makes one group of equal prompts in a step: set density.no_repeat_within to "
                "grpo.num_prompts_per_step, or to 0 if nothing is grouped (SFT)",
                stacklevel=2,
            )
        named = options.get("key_column") or options.get("id_column")
        items = self.dataset if named else [prompt_of(row["messages"]) for row in self.dataset]
        self.dataset = self.dataset.select(StoreSampler(items, **options).plan(0))


def prompt_of(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A chat without the answer at its end."""
    ends_in_answer = messages[-1]["role"] == "assistant" if messages else False
    return list(messages[:-1] if ends_in_answer else messages)
