"""``embstore build``: the main job."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from embstore.cli.frame import AsJson, Out, Resume, app, reporting, run_and_print
from embstore.cli.options import HelpAll, PanelCommand, takes
from embstore.core.config import BuildConfig
from embstore.core.errors import ConfigError


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
    scratch: Annotated[
        Path | None,
        typer.Option(
            "--scratch",
            help="Folder where --dry-run puts an index of prompts that --memory-budget has no room for. Default: that of "
            "temporary files.",
            rich_help_panel="advanced",
        ),
    ] = None,
    as_json: AsJson = False,
    help_all: HelpAll = False,
) -> None:
    """Embed prompts, find neighbours, write weights.

    If a build is killed, run the same command with --resume: it continues where it stopped.
    """
    if dry_run:
        from embstore.flow.dry_run import preflight  # noqa: PLC0415 - other commands start without it

        planned = functools.partial(preflight, prompts, out=out, config=config, scratch=scratch)
        run_and_print(planned, out, as_json=as_json)
        return
    from embstore.flow import build as build_flow  # noqa: PLC0415

    if scratch is not None:
        raise ConfigError("--scratch applies to a dry run", hint="leave it out; a build has its scratch files in the store")
    work = functools.partial(build_flow.build, prompts, out=out, config=config, resume=resume)
    run_and_print(work, out, as_json=as_json)
