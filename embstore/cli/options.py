"""The config classes as options of a command: each field's declaration (core.declared) becomes a typer parameter.

A command takes its config as one argument. ``takes`` puts the options of the config's class in its place, and makes the
config from what was given. ``PanelCommand`` shows options by panel.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from embstore.core.config import parse_bytes
from embstore.core.declared import Panel

_PANELS = typing.get_args(Panel)
_AUTO = "auto"  # a size that is chosen: None in a config
_SHOWS_ALL = "embstore.help_all"  # set in a command's context once --help-all was given


class PanelCommand(TyperCommand):
    """A command whose help is grouped by panel, without the advanced options unless ``--help-all`` is given."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - typer's own click has no public name
        """Write one section per panel."""
        panels = by_panel(self.get_params(ctx))
        hidden = panels.pop("advanced", []) if _SHOWS_ALL not in ctx.meta else []
        for panel, parameters in panels.items():
            with formatter.section(panel.capitalize()):
                formatter.write_dl([each.get_help_record(ctx) for each in parameters])
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(
                f"{len(hidden)} advanced options are not shown. To list them: {ctx.command_path} --help-all"
            )


def by_panel(parameters: Iterable[Any]) -> dict[str, list[Any]]:
    """Parameters of a command by panel, in the order of ``--help``. Those that declare none are input."""
    panels: dict[str, list[Any]] = {panel: [] for panel in (*_PANELS[:-1], "general", _PANELS[-1])}
    for each in parameters:
        panel = getattr(each, "rich_help_panel", None) or ("general" if "--help" in each.opts else "input")
        panels[panel].append(each)
    return {panel: found for panel, found in panels.items() if found}


def _print_all(context: typer.Context, value: bool) -> None:
    if value:
        context.meta[_SHOWS_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all", callback=_print_all, is_eager=True, help="Show every option and exit.", rich_help_panel="general"
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Option:
    path: tuple[str, ...]  # to its field, from the config down
    field: dataclasses.Field[Any]
    parameter: inspect.Parameter


def takes(config: type[Any], *, only: Container[str] | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command whose parameter ``config`` is made from options.

    ``config`` is a class of core.config, with or without other such classes in it. ``only`` names the fields that the
    command uses; None: all.
    """
    options = [each for each in _options(config) if only is None or any(name in only for name in each.path)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "config"]
        shown = [*own, *(each.parameter for each in options)]

        @functools.wraps(command)
        def run(**given: Any) -> None:  # noqa: ANN401 - each option has its own type
            chosen = {each.path: _value(each.field, given.pop(each.parameter.name)) for each in options}
            command(**given, config=_made(config, chosen))

        run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return run

    return decorate


def _options(config: type[Any], path: tuple[str, ...] = ()) -> Iterator[_Option]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint, here = hints[field.name], (*path, field.name)
        if dataclasses.is_dataclass(hint):
            yield from _options(typing.cast(type[Any], hint), here)
        elif field.metadata["panel"] is not None:
            yield _Option(path=here, field=field, parameter=_parameter(field, hint))


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:  # noqa: ANN401 - a type
    flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
    default: Any = field.default
    metavar = f"<{unit}>" if (unit := field.metadata["unit"]) else None
    if unit == "bytes":
        hint, default, metavar = str, _AUTO if default is None else f"{default / (1 << 30):g}GiB", "<size>"
    elif isinstance(default, tuple):
        hint, default, metavar = (str if field.metadata["separator"] else list[str]) | None, None, "<str>"
    info = typer.Option(flag, help=field.metadata["help"], metavar=metavar, rich_help_panel=field.metadata["panel"])
    name = flag.removeprefix("--").replace("-", "_")
    annotation = Annotated[hint, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(field: dataclasses.Field[Any], given: Any) -> object:  # noqa: ANN401 - each option has its own type
    """The field's value; sizes, tuples and "no limit" are written differently on the command line."""
    if field.metadata["unit"] == "bytes":
        return None if given == _AUTO and field.default is None else parse_bytes(given)
    if isinstance(field.default, tuple):
        if isinstance(given, str):
            return tuple(part.strip() for part in given.split(field.metadata["separator"]))
        return tuple(given or ())
    is_limit = field.type == "float | None" and field.default is not None
    return None if is_limit and given == math.inf else given


def _made(config: type[Any], chosen: dict[tuple[str, ...], object], path: tuple[str, ...] = ()) -> Any:  # noqa: ANN401
    """A config of the values chosen, by path; everything else has its default."""
    values = {}
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        here = (*path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = _made(hints[field.name], chosen, here)
        elif here in chosen:
            values[field.name] = chosen[here]
    return config(**values)
