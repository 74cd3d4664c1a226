"""``embstore verify``: check every stored byte."""

from __future__ import annotations

from typing import Annotated

import typer

from embstore.cli.frame import AsJson, Store, app, print_json, reporting
from embstore.core.errors import ExitCode


@app.command()
@reporting
def verify(
    store: Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mark damaged windows as missing, so that build --resume computes them again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every stored byte.

    Reads everything back: checksums, finite values, norms, stray files. Exits with 3 if the store is damaged,
    with 6 if it is unfinished.
    """
    from embstore.views import info, progress, terminal  # noqa: PLC0415

    with progress.on_stderr() as observer:
        report = info.verify(store, repair=repair, observer=observer)
    if as_json:
        print_json(report)
    else:
        terminal.print_verify(terminal.results(), report, repaired=repair)
    if report.findings:
        raise typer.Exit(int(ExitCode.CORRUPT))
    if not report.is_complete:
        raise typer.Exit(int(ExitCode.INCOMPLETE))
