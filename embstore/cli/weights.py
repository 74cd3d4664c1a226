"""``embstore weights``: new weights, no search; and the list of those that a store has."""

from __future__ import annotations

from typing import Annotated

import typer

from embstore.cli.frame import AsJson, Store, app, print_json, reporting
from embstore.cli.options import takes
from embstore.core.errors import ConfigError
from embstore.core.factors import WeightsConfig
from embstore.core.format import DEFAULT_WEIGHTS


@app.command()
@reporting
@takes(WeightsConfig)
def weights(
    store: Store,
    *,
    config: WeightsConfig,
    name: Annotated[
        str, typer.Option(help="Store the weights under this name. Those that had it stay, as NAME@DIGEST.")
    ] = DEFAULT_WEIGHTS,
    listed: Annotated[bool, typer.Option("--list", help="List the weights of the store, and compute none.")] = False,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Delete these weights, and compute none. Runs that began with them cannot be resumed."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute new weights without a new search, in seconds.

    A weight is density x score x share of its group, then limited and mixed. Fields of the input lines cost a pass
    over the prompts.

    Weights that were replaced stay, 4 bytes a prompt, because training runs may use them.
    """
    from embstore.flow import artifact, stored_weights  # noqa: PLC0415
    from embstore.flow.weight_factors import make_factors  # noqa: PLC0415
    from embstore.views import info, terminal  # noqa: PLC0415

    if listed or drop:
        if config != WeightsConfig() or name != DEFAULT_WEIGHTS:
            raise ConfigError(
                "--list and --drop compute no weights, so they take no options of weights",
                hint="leave out all options but --list, --drop and --json",
            )
        if drop:
            stored_weights.drop_weights(store, drop)
        found = stored_weights.list_weights(store)
        if as_json:
            print_json(found)
        else:
            terminal.print_weightings(terminal.results(), found)
        return
    metadata = artifact.recompute_weights(store, config.weighting, name=name, factors=make_factors(store, config.factors))
    if as_json:
        print_json(metadata)
    else:
        terminal.print_info(terminal.results(), info.inspect(store, name=name))
