"""Density sampling in axolotl, by the YAML of a run: a plugin that attaches the sampler to the trainer that axolotl makes.

plugins: [embstore.integrations.axolotl.DensityPlugin]
embstore_store: STORE
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from embstore.integrations.trl import attach
from embstore.training import load_weights


class DensityArgs(BaseModel):
    """The keys that axolotl's schema gets: a store, the name of its weights, and what ``attach`` and the sampler take."""

    embstore_store: str
    embstore_weights: str = "default"
    embstore_id_column: str | None = None
    embstore_key_column: str | None = None
    embstore_seed: int = 0
    embstore_num_samples: int | None = None
    embstore_no_repeat_within: int = 0

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Axolotl drops keys that it does not know."""
        if unknown := {key for key in keys if key.startswith("embstore_")} - DensityArgs.model_fields.keys():
            raise ValueError(
                f"there is no key {', '.join(sorted(unknown))}: there are {', '.join(DensityArgs.model_fields)}"
            )
        return keys


class DensityPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is not in the development environment
    """Rows are joined after axolotl has filtered and shuffled them; see ``attach`` for what is refused."""

    def get_input_args(self) -> str:
        """The class whose fields axolotl adds to its schema."""
        return f"{__name__}.{DensityArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:  # noqa: ANN401
        """Attach the sampler; axolotl calls this before it trains."""
        weights = load_weights(cfg.embstore_store, name=cfg.embstore_weights)
        attach(
            trainer,
            weights,
            id_column=cfg.embstore_id_column,
            key_column=cfg.embstore_key_column,
            seed=cfg.embstore_seed,
            num_samples=cfg.embstore_num_samples,
            no_repeat_within=cfg.embstore_no_repeat_within,
        )
