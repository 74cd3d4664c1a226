"""Write ``docs/cli.md`` from the command line itself: ``python -m scripts.cli_docs``.

Names, choices and defaults are read from the commands that typer makes and users type, not from the functions behind them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from embstore.cli import app
from embstore.cli.options import PanelCommand, by_panel
from embstore.core.errors import ExitCode

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"

_HEAD = """# Command line

Made by `python -m scripts.cli_docs` from the commands themselves. `embstore COMMAND --help` shows the same; for `build` and
`import`, `--help-all` adds the advanced options.

Results go to stdout, progress and messages to stderr. `--json` prints results for programs.

| exit code | meaning |
|---|---|
"""
_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.ERROR: "an expected error, such as unusable prompts, an unknown model, too little memory or a failed export",
    ExitCode.USAGE: "wrong use of the command line, or an unknown name, field or id",
    ExitCode.CORRUPT: "the store is damaged: bytes differ from what was committed",
    ExitCode.IDENTITY: "the store was made from a different input, or has another format version",
    ExitCode.LOCKED: "another process is writing the store",
    ExitCode.INCOMPLETE: "the store is unfinished, or the disk failed in a build; `embstore build --resume` continues it",
    ExitCode.INTERRUPTED: "stopped by a signal, after a clean commit",
}


def page() -> str:
    """The whole page."""
    text = _HEAD + "".join(f"| {int(code)} | {meaning} |\n" for code, meaning in _MEANINGS.items())
    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="embstore")
    for name, command in group.commands.items():
        text += f"\n## embstore {name}\n\n{command.help}\n"
        panels = by_panel(command.params) if isinstance(command, PanelCommand) else {"": command.params}
        for panel, parameters in panels.items():
            text += f"\n**{panel.capitalize()}**\n" if panel else ""
            text += "\n| option | default | meaning |\n|---|---|---|\n"
            text += "".join(_row(parameter, context) for parameter in parameters)
    return text


def _row(parameter: Any, context: typer.Context) -> str:  # noqa: ANN401 - typer's own click has no public name
    choices = r"\|".join(item.value for item in parameter.shell_complete(context, "") if item.type == "plain")
    names = "`, `".join([*parameter.opts, *parameter.secondary_opts])
    name = (
        parameter.name.upper() if parameter.param_type_name == "argument" else f"`{names}{' ' + choices if choices else ''}`"
    )
    default = "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"
    return f"| {name} | {'required' if parameter.required else default} | {parameter.help} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
