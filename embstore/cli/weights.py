"""``embstore weights``: new weights, no search."""

from __future__ import annotations

from typing import Annotated

import typer

from embstore.cli.frame import AsJson, Store, app, print_json, reporting
from embstore.cli.weighting import CopiesOf, Gamma, K, MaxRatio, Method, TargetEss, UniformMix, weighting_config


@app.command()
@reporting
def weights(
    store: Store,
    name: Annotated[
        str, typer.Option("--name", help="Keep these weights under a name, beside the default ones.")
    ] = "default",
    weighting: Method = "inverse-density",
    k: K = 10,
    gamma: Gamma = 1.0,
    target_ess: TargetEss = None,
    uniform_mix: UniformMix = 0.0,
    max_ratio: MaxRatio = 10.0,
    duplicates: CopiesOf = "collapse",
    as_json: AsJson = False,
) -> None:
    """New weights from the neighbours a store already has, in seconds."""
    from embstore.flow import artifact  # noqa: PLC0415
    from embstore.views import info, terminal  # noqa: PLC0415

    config = weighting_config(weighting, k, gamma, target_ess, uniform_mix, max_ratio, duplicates)
    metadata = artifact.recompute_weights(store, config, name=name)
    if as_json:
        print_json(metadata)
    else:
        terminal.print_info(terminal.results(), info.inspect(store, name=name))
