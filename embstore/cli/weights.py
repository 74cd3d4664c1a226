"""``embstore weights``: new weights, no search."""

from __future__ import annotations

from typing import Annotated

import typer

from embstore.cli.frame import AsJson, Store, app, print_json, reporting
from embstore.cli.options import takes
from embstore.core.config import WeightingConfig


@app.command()
@reporting
@takes(WeightingConfig)
def weights(
    store: Store,
    *,
    config: WeightingConfig,
    name: Annotated[str, typer.Option(help="Store the weights under this name; other names are kept.")] = "default",
    as_json: AsJson = False,
) -> None:
    """Compute new weights without a new search, in seconds."""
    from embstore.flow import artifact  # noqa: PLC0415
    from embstore.views import info, terminal  # noqa: PLC0415

    metadata = artifact.recompute_weights(store, config, name=name)
    if as_json:
        print_json(metadata)
    else:
        terminal.print_info(terminal.results(), info.inspect(store, name=name))
