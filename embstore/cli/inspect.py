"""``embstore inspect``: a store on the terminal, as a page or as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embstore.cli.frame import AsJson, Store, app, print_json, reporting
from embstore.core.config import format_bytes


@app.command()
@reporting
def inspect(
    store: Store,
    neighbors: Annotated[str | None, typer.Option(help="Show the prompts nearest to the one with this id.")] = None,
    by: Annotated[
        str | None,
        typer.Option(help="Show the share of weight for each value of this input field, or for its 1,000 heaviest."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the weights to show.")] = "default",
    html: Annotated[
        Path | None, typer.Option(help="Write a report as one self-contained page. Needs embstore[report].")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write the summary plots as a picture. Needs embstore[report].")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a store contains and what its weights say.

    Reads no rows: fast, also while the store is being built. --by and the reports read every prompt.
    """
    from embstore.views import info, terminal  # noqa: PLC0415

    if html is not None or png is not None:
        from embstore.views.report.write import write_report  # noqa: PLC0415

        written = write_report(store, html=html, png=png, by=by, name=name)
        if as_json:
            print_json(written)
        else:
            for file in written:
                shown = f"{file.path} ({format_bytes(file.bytes)})"
                terminal.results().print(shown, highlight=False, markup=False, soft_wrap=True)
        return
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
