"""``embstore compare``: two weightings beside each other."""

from __future__ import annotations

from typing import Annotated

import typer

from embstore.cli.frame import AsJson, app, print_json, reporting


@app.command()
@reporting
def compare(
    left: Annotated[str, typer.Argument(help="STORE or STORE:NAME.", show_default=False)],
    right: Annotated[str, typer.Argument(help="STORE or STORE:NAME.", show_default=False)],
    count: Annotated[int, typer.Option("--count", help="How many prompts that rose and that fell most.")] = 5,
    as_json: AsJson = False,
) -> None:
    """How far two weightings are apart, of one store or of two, and which prompts moved most."""
    from embstore.views import comparison, terminal  # noqa: PLC0415

    found = comparison.compare(left, right, count=count)
    if as_json:
        print_json(found)
    else:
        terminal.print_comparison(terminal.results(), found)
