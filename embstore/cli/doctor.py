"""``embstore doctor``: what a trainer would draw, and what to beware of in that trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from embstore.cli.frame import AsJson, Store, app, print_json, reporting
from embstore.cli.joining import (
    Duplicates,
    Epoch,
    IdColumn,
    KeyColumn,
    Missing,
    Name,
    NoRepeatWithin,
    NumSamples,
    Seed,
    policy_of,
    warnings_as_notes,
)

if TYPE_CHECKING:
    from embstore.training.preview import Preview
    from embstore.training.trainer_entry import Trainer

_SHOWN_CHARACTERS = 90


@app.command()
@reporting
def doctor(
    store: Store,
    dataset: Annotated[Path, typer.Argument(help="The trainer's file: JSONL, a JSON array, or Parquet; - for stdin.")],
    trainer: Annotated[str, typer.Option(help="Name of the trainer, as in docs/train: trl, verl, axolotl and others.")],
    name: Name = "default",
    num_samples: NumSamples = None,
    seed: Seed = 0,
    epoch: Epoch = 0,
    no_repeat_within: NoRepeatWithin = 0,
    prompts_per_step: Annotated[
        int | None, typer.Option(help="Draws of one step: counts the steps that draw an item twice.")
    ] = None,
    key_column: KeyColumn = None,
    id_column: IdColumn = None,
    on_missing: Missing = "error",
    duplicates: Duplicates = "repeat",
    count: Annotated[int, typer.Option(help="How many draws to show.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show what a trainer would draw from a dataset, and its traps.

    The dataset is joined and drawn from as in training; the trainer need not be installed. Traps are settings of the trainer
    that change or ignore the order in silence.
    """
    from embstore.training.preview import preview  # noqa: PLC0415
    from embstore.training.trainers import trainer_of  # noqa: PLC0415

    entry = trainer_of(trainer)
    with warnings_as_notes():
        found = preview(
            store,
            dataset,
            name=name,
            num_samples=num_samples,
            seed=seed,
            epoch=epoch,
            no_repeat_within=no_repeat_within,
            key_column=key_column,
            id_column=id_column,
            on_missing=policy_of(on_missing),
            duplicates=duplicates,
            prompts_per_step=prompts_per_step,
            count=count,
        )
    if as_json:
        print_json({"trainer": asdict(entry), "drawn": asdict(found)})
        return
    for line in (*_drawn(found, f"{store}:{name}", epoch), *_described(entry)):
        Console().print(line, highlight=False, soft_wrap=True)


def _drawn(found: Preview, weights: str, epoch: int) -> Iterator[str]:
    """The join and the draws."""
    yield f"[bold]{escape(found.dataset)}[/bold]: {found.num_items:,} items, joined to {escape(weights)}"
    if found.never_drawn:
        yield f"  never drawn, because their weight is 0: {found.never_drawn:,} items"
    yield (
        f"  epoch {epoch}: {found.num_samples:,} draws of {found.distinct_items:,} items, none more than "
        f"{found.most_times} times; effective sample size {found.ess:,.0f}"
    )
    if found.steps is not None:
        yield f"  {found.steps_with_repeats:,} of {found.steps:,} steps draw an item twice"
    for number, draw in enumerate(found.first):
        text = draw.text[:_SHOWN_CHARACTERS] + ("..." if len(draw.text) > _SHOWN_CHARACTERS else "")
        yield f"  draw {number}: item {draw.item} ({draw.times} x)  [dim]{escape(text)}[/dim]"


def _described(entry: Trainer) -> Iterator[str]:
    """The trainer's entry of the table."""
    yield f"[bold]{escape(entry.title)}[/bold] {escape(entry.versions)}"
    facts = {"hook": entry.hook, "joined by": entry.joined_by, "order": entry.order, "resume": entry.resume}
    yield from (f"  {fact + ':':<11}{escape(text)}" for fact, text in facts.items())
    yield from (f"  [yellow]trap[/yellow]: {escape(trap.text)}" for trap in entry.traps)
    yield f"  configuration and what was tested: docs/train/{entry.name}.md"
