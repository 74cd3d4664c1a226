"""Write ``docs/cli.md`` from the command line itself, so that it cannot drift: ``python -m scripts.cli_docs``."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

from embstore.cli import app
from embstore.core.errors import ExitCode

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"

_HEAD = """# Command line

Made by `python -m scripts.cli_docs` from the commands' own help; a test compares.

Results go to stdout, progress and messages to stderr. `--json` prints results for programs.

| exit code | meaning |
|---|---|
"""
_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.ERROR: "expected error: prompts, model, budget, no store there",
    ExitCode.USAGE: "wrong use of the command line",
    ExitCode.CORRUPT: "bytes are not what was committed",
    ExitCode.IDENTITY: "another input than the store was made from, or another format version",
    ExitCode.LOCKED: "another process is writing the store",
    ExitCode.INCOMPLETE: "unfinished; `embstore build --resume` continues",
    ExitCode.INTERRUPTED: "stopped by a signal after a clean commit",
}


def page() -> str:
    """The whole page, read from the signatures of the commands."""
    text = _HEAD + "".join(f"| {int(code)} | {meaning} |\n" for code, meaning in _MEANINGS.items())
    for command in app.registered_commands:
        function = command.callback
        if function is None:
            raise AssertionError("every command has a function")
        text += f"\n## embstore {function.__name__}\n\n{function.__doc__}\n\n| option | default | meaning |\n|---|---|---|\n"
        hints = typing.get_type_hints(function, include_extras=True)
        for name, parameter in inspect.signature(function).parameters.items():
            text += _row(name, parameter.default, hints[name])
    return text


def _row(name: str, default: object, hint: Any) -> str:  # noqa: ANN401 - a type with its option
    kind, info = typing.get_args(hint)
    parts = (kind, *typing.get_args(kind))
    choices = [choice for part in parts for choice in typing.get_args(part) if isinstance(choice, str)]
    # inside Annotated, typer takes the first option name for a default
    declared = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
    names = ", ".join(f"`{option}`" for option in declared) or name.upper()
    is_required = default is inspect.Parameter.empty or default is ...
    shown = "required" if is_required else "" if default in (None, False) else f"`{default}`"
    meaning = " or ".join(choices) + ". " if choices else ""
    return f"| {names} | {shown} | {meaning}{info.help or ''} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
