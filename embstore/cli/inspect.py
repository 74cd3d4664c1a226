"""``embstore inspect``: what a store is."""

from __future__ import annotations

from typing import Annotated

import typer

from embstore.cli.frame import AsJson, Store, app, print_json, reporting


@app.command()
@reporting
def inspect(
    store: Store,
    neighbors: Annotated[
        str | None, typer.Option("--neighbors", help="Show the nearest distinct prompts of this id.")
    ] = None,
    by: Annotated[str | None, typer.Option("--by", help="Share of weight by this field of the input lines.")] = None,
    name: Annotated[str, typer.Option("--name", help="Which weights.")] = "default",
    as_json: AsJson = False,
) -> None:
    """What a store is, how far it is, and what its weights say. Instant, also while it is being built."""
    from embstore import info, terminal  # noqa: PLC0415

    if neighbors is not None:
        found = info.neighbors_of(store, neighbors)
        if as_json:
            print_json(found)
        else:
            terminal.print_neighbors(terminal.results(), neighbors, found)
        return
    described = info.inspect(store, by=by, name=name)
    if as_json:
        print_json(described)
    else:
        terminal.print_info(terminal.results(), described)
