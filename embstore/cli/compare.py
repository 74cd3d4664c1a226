"""``embstore compare``: how two weightings differ."""

from __future__ import annotations

from typing import Annotated

import typer

from embstore.cli.frame import AsJson, app, print_json, reporting


@app.command()
@reporting
def compare(
    left: Annotated[str, typer.Argument(help="STORE or STORE:NAME.")],
    right: Annotated[str, typer.Argument(help="STORE or STORE:NAME.")],
    count: Annotated[int, typer.Option(help="How many prompts to show of those that rose most and fell most.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show how two weightings differ, of one store or of two.

    Prints their distance, their rank correlation, and the prompts whose weights moved most.
    """
    from embstore.views import comparison, terminal  # noqa: PLC0415

    found = comparison.compare(left, right, count=count)
    if as_json:
        print_json(found)
    else:
        terminal.print_comparison(terminal.results(), found)
