"""``embstore build``: the main job."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from embstore.cli.frame import AsJson, Out, Resume, app, reporting, run_and_print
from embstore.cli.options import HelpAll, PanelCommand, takes
from embstore.core.config import BuildConfig


@app.command(cls=PanelCommand)
@reporting
@takes(BuildConfig)
def build(
    prompts: Annotated[
        str | None,
        typer.Argument(
            help="JSONL, CSV, Parquet or Arrow, also compressed; a folder of them; - for stdin; or a dataset of the hub, "
            "org/name. Not needed on a resume."
        ),
    ] = None,
    *,
    config: BuildConfig,
    out: Out,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the build would do and cost. Writes nothing.")
    ] = False,
    as_json: AsJson = False,
    help_all: HelpAll = False,
) -> None:
    """Embed prompts, find neighbours, write weights.

    If a build is killed, run the same command with --resume: it continues where it stopped.
    """
    from embstore.flow import build as build_flow  # noqa: PLC0415 - other commands start without it

    if dry_run:
        planned = functools.partial(build_flow.preflight, prompts, out=out, config=config)
        run_and_print(planned, out, as_json=as_json)
    else:
        work = functools.partial(build_flow.build, prompts, out=out, config=config, resume=resume)
        run_and_print(work, out, as_json=as_json)
