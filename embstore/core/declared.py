"""Options declared once: a field of a config class with its help.

The command line (cli.options), its page (docs/cli.md) and the docstrings of the config classes are made from these fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import field
from typing import Any, Literal, TypeVar

Panel = Literal["input", "model", "search", "weights", "resources", "workers", "advanced"]

_Config = TypeVar("_Config")
_Default = TypeVar("_Default")


def option(
    default: _Default,
    help: str,
    panel: Panel = "advanced",
    *,
    flag: str | None = None,
    unit: str | None = None,
    separator: str | None = None,
) -> _Default:
    """A field that the command line offers.

    Parameters
    ----------
    default, help
        Its default, and what it does.
    panel
        Where ``--help`` lists it; the advanced panel is shown by ``--help-all`` only.
    flag
        Its name on the command line, where that is not ``--`` and the field's name.
    unit
        What the number counts. ``bytes`` are given as a size such as ``2GiB``.
    separator
        Splits a text into the parts of a tuple; without it, a tuple's option is repeated.
    """
    metadata = {"help": help, "panel": panel, "flag": flag, "unit": unit, "separator": separator}
    return field(default=default, metadata=metadata)


def python_only(default: _Default, help: str, *, unit: str | None = None) -> _Default:
    """A field that the command line does not offer."""
    return field(default=default, metadata={"help": help, "panel": None, "unit": unit})


def documented(config: type[_Config]) -> type[_Config]:
    """Add every field with its type, default, unit and help to the docstring."""
    config.__doc__ = f"{inspect.cleandoc(config.__doc__ or '')}\n\nParameters\n----------\n" + "\n".join(_described(config))
    return config


def _described(config: type[Any], prefix: str = "") -> list[str]:
    lines = []
    hints = typing.get_type_hints(config)
    for each in dataclasses.fields(config):
        name, hint = f"{prefix}{each.name}", hints[each.name]
        if dataclasses.is_dataclass(hint):
            lines += [f"{name} : {each.type}", *_described(hints[each.name], f"{name}.")]
            continue
        literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is Literal]
        choices = ", ".join(repr(choice) for literal in literals for choice in typing.get_args(literal))
        unit = f", in {each.metadata['unit']}" if each.metadata["unit"] else ""
        lines += [f"{name} : {f'{{{choices}}}' if choices else each.type}, default {each.default!r}{unit}"]
        lines += [f"    {each.metadata['help']}"]
    return lines
