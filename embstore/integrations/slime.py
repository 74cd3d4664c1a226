"""Density sampling in slime, by configuration: a data source whose shuffled order is the plan of a sampler.

    --data-source-path embstore.integrations.slime.DensityDataSource --rollout-shuffle --custom-config-path density.yaml

``density.yaml`` has a ``density`` part with the options of ``StoreSampler``: ``density: {store: STORE}``. Everything else is
slime's own: groups, the buffer, and its saved place, a pass and an offset within it (read at commit 624b824, version 0.3.1).
"""

from __future__ import annotations

from typing import Any

from slime.rollout.data_source import RolloutDataSourceWithBuffer

from embstore.core.errors import ConfigError
from embstore.integrations.sampler import StoreSampler, configured


class DensityDataSource(RolloutDataSourceWithBuffer):  # type: ignore[misc]  # slime is untyped
    """slime's data source with a buffer, whose prompts are drawn by the store's weights; each pass has its own draws.

    Prompts are joined by content, or by ``density.id_column``, a field of their metadata. Templated ones (slime's
    ``--apply-chat-template``) are no longer what a store was built from, so they need that field. ``seed`` defaults to
    ``--rollout-seed``, and a pass is ``num_samples`` draws.

    Raises
    ------
    ConfigError
        There is no ``density`` part, ``--rollout-shuffle`` is not set, there are no prompts, or templated ones without ids.
    WeightsError
        ``load``: the saved run drew from other weights, or with other options.
    """

    def __init__(self, args: Any) -> None:  # noqa: ANN401 - slime's namespace
        super().__init__(args)
        options = configured({"density": getattr(args, "density", None), "seed": args.rollout_seed})
        if self.dataset is None or not args.rollout_shuffle:
            raise ConfigError(
                "the order of slime's prompts is not the data source's", hint="set --prompt-data and --rollout-shuffle"
            )
        if args.apply_chat_template and options.keys().isdisjoint(("id_column", "keys")):
            raise ConfigError(
                "slime renders the prompts with a chat template, and a store has them without one",
                hint="join by an id in the metadata of each prompt: density.id_column",
            )
        samples = self.dataset.origin_samples
        items = [sample.metadata if "id_column" in options else sample.prompt for sample in samples]
        self.sampler = StoreSampler(items, **options)
        self.metadata["density"] = self.sampler.state_dict()  # slime saves and loads it
        self.dataset.shuffle = self._draw
        self._draw(self.epoch_id)

    def _draw(self, epoch: int) -> None:
        """In place of the dataset's own ``shuffle``, which slime calls at each pass and after it has loaded its place."""
        samples = self.dataset.origin_samples
        self.dataset.samples = [samples[row] for row in self.sampler.plan(epoch)]
        self.dataset.epoch_id = epoch

    def load(self, rollout_id: int | None = None) -> None:
        """Load slime's place, and refuse one of a run that drew in another order."""
        super().load(rollout_id)
        self.sampler.load_state_dict(self.metadata.setdefault("density", self.sampler.state_dict()))
