"""What commands share that join a trainer's file to a store: its options, and warnings as notes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from embstore.core.decode import printable

if TYPE_CHECKING:
    from embstore.training.join import OnMissing

Name = Annotated[str, typer.Option(help="Name of the weights to use.")]
NumSamples = Annotated[int | None, typer.Option(help="Number of draws. Default: one per item.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
Epoch = Annotated[int, typer.Option(help="Epoch to draw; each epoch has its own draws.")]
NoRepeatWithin = Annotated[int, typer.Option(help="Minimum distance of repeats of an item, in draws (systematic).")]
KeyColumn = Annotated[
    str | None, typer.Option(help="Column with prompts. Default: those that the build read, or prompt or messages.")
]
IdColumn = Annotated[str | None, typer.Option(help="Column with ids to join by, instead of by content.")]
Missing = Annotated[str, typer.Option(help="Items not in the store: error, drop, mean, or a multiple of the mean.")]
Duplicates = Annotated[
    Literal["repeat", "divide"],
    typer.Option(help="Items of one row: give each its weight (repeat), or a share of it (divide)."),
]


def policy_of(on_missing: str) -> OnMissing:
    """``--on-missing`` as the library takes it, which checks its words."""
    policy: str | float = on_missing
    with contextlib.suppress(ValueError):
        policy = float(on_missing)
    return policy  # type: ignore[return-value]


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print the library's warnings as notes on stderr, once the work is done."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        yield
    for notice in said:
        Console(stderr=True).print(f"note: {escape(printable(str(notice.message)))}", highlight=False, soft_wrap=True)
