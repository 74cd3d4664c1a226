"""The command line: options -> config -> one call of the library. Nothing is computed here.

Results go to stdout, messages to stderr; ``--json`` wherever a program may read. Exit codes are core.errors.ExitCode.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

from embstore import __version__
from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig, Pooling, Space, WeightingConfig, parse_bytes
from embstore.core.decode import printable, printable_json
from embstore.core.errors import EmbstoreError, ExitCode
from embstore.interrupts import STOP_SIGNALS

_Arguments = ParamSpec("_Arguments")

app = typer.Typer(
    name="embstore",
    help="Offline embedding and density store for LLM post-training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Store = Annotated[Path, typer.Argument(help="Folder of the store.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Method = Annotated[
    Literal["inverse-density", "legacy-inverse", "uniform"],
    typer.Option("--weighting", help="legacy-inverse favours crowds, as the original did: for comparison only."),
]
K = Annotated[
    int, typer.Option("--k", help="Nearest distinct vectors whose mean distance is a prompt's rarity (at most 32).")
]
Gamma = Annotated[float, typer.Option("--gamma", help="Weight is proportional to mean distance ** gamma.")]
TargetEss = Annotated[
    float | None, typer.Option("--target-ess", help="Solve gamma for this effective sample size, as a share of the rows.")
]
UniformMix = Annotated[float, typer.Option("--uniform-mix", help="Share of uniform sampling mixed in.")]


def main() -> None:
    """Entry point of the ``embstore`` command."""
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    app()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Any signal to stop ends the process as an interrupted one."""
    # not SIG_IGN yet: Python complains of a signal that it took before it was ignored
    for each in STOP_SIGNALS:
        signal.signal(each, _stopping)
    raise KeyboardInterrupt


def _stopping(number: int, frame: FrameType | None) -> None:
    """A signal to a process that is stopping already."""


def _ignore_signals() -> None:
    """On the way out: another signal would only spoil the message and the exit code. A caller's own handlers stay."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (_stop, _stopping):
            signal.signal(number, signal.SIG_IGN)


def _reporting(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Turn an expected error into two lines and its exit code; anything else is a bug and keeps its traceback."""

    @functools.wraps(command)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            _report(lambda: command(*args, **kwargs))
        except KeyboardInterrupt:
            _ignore_signals()
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None

    return run


def _report(command: Callable[[], None]) -> None:
    try:
        command()
    except EmbstoreError as error:
        _ignore_signals()
        console = Console(stderr=True, soft_wrap=True, emoji=False)
        console.print(f"[bold red]error[/bold red]: {escape(printable(str(error)))}", highlight=False)
        if error.hint:
            console.print(f"[bold]hint[/bold]: {escape(printable(error.hint))}", highlight=False)
        raise typer.Exit(int(error.exit_code)) from None


def _print_version(value: bool) -> None:
    if value:
        Console().print(f"embstore {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Offline embedding and density store for LLM post-training."""


@app.command()
@_reporting
def build(
    prompts: Annotated[
        str | None, typer.Argument(help="JSONL, also gzipped, or - for stdin; not needed on a resume.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the store.", show_default=False)] = ...,  # type: ignore[assignment]
    model: Annotated[str | None, typer.Option("--model", help="Folder or hub id of a causal LM.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is there; starts anew if nothing is.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Of the backbone; pooling and head are float32. auto: fastest that moves no weight."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="First tokens kept of each prompt; default 512.")
    ] = None,
    space: Annotated[
        Space | None,
        typer.Option("--space", help="Rows of logits, or of final hidden states (also of encoders)."),
    ] = None,
    pooling: Annotated[
        Pooling | None, typer.Option("--pooling", help="Mean over a prompt's own tokens, or the last one alone.")
    ] = None,
    vocab: Annotated[
        Literal["model", "tokenizer"] | None,
        typer.Option("--vocab", help="All columns of the model's logits, or without its padding columns."),
    ] = None,
    compressor: Annotated[
        Literal["lz4", "none"] | None, typer.Option("--compressor", help="none: chunks can be mapped.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", help="Padded tokens in a batch; default 2048 on a CPU.")
    ] = None,
    window_rows: Annotated[int | None, typer.Option("--window-rows", help="Rows of one commit.")] = None,
    chunk_rows: Annotated[int | None, typer.Option("--chunk-rows", help="Rows of one chunk file.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads; default all this process may use.")] = None,
    trust_tokenizer_pickle: Annotated[
        bool | None,
        typer.Option("--trust-tokenizer-pickle", help="Unpickle nanochat's tokenizer.pkl, which can run any code."),
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code/--no-trust-remote-code", help="Run the model's own code; recorded.")
    ] = None,
    memory_budget: Annotated[str, typer.Option("--memory-budget", help="Anonymous memory above the loaded model.")] = "2GiB",
    knn: Annotated[Literal["hnsw", "exact"], typer.Option("--knn", help="How neighbours are found.")] = "hnsw",
    shards: Annotated[
        int | None, typer.Option("--shards", help="HNSW shards; default what memory and cores ask for.")
    ] = None,
    weighting: Method = "inverse-density",
    k: K = 10,
    gamma: Gamma = 1.0,
    target_ess: TargetEss = None,
    uniform_mix: UniformMix = 0.0,
    on_error: Annotated[
        Literal["stop", "quarantine"],
        typer.Option("--on-error", help="A prompt that fails in the model: stop, or keep its row empty."),
    ] = "stop",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse the file if any line holds no prompt.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N distinct prompts.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and cost; write nothing.")] = False,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Resume on other hardware or threads; recorded, voids byte identity.")
    ] = False,
    trust_journal: Annotated[
        bool, typer.Option("--trust-journal", help="Resume without reading committed rows back.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Embed prompts, find neighbours, write weights. Killed at any moment, the same line with --resume continues it."""
    config = BuildConfig(
        embedding=EmbeddingConfig(
            model=model,
            revision=revision,
            device=device,
            dtype=dtype,
            max_tokens=max_tokens,
            space=space,
            pooling=pooling,
            vocab=vocab,
            batch_tokens=batch_tokens,
            window_rows=window_rows,
            chunk_rows=chunk_rows,
            threads=threads,
            compressor=compressor,
            trust_remote_code=trust_remote_code,
            trust_tokenizer_pickle=trust_tokenizer_pickle,
        ),
        density=DensityConfig(knn=knn, shards=shards),
        weighting=_weighting(weighting, k, gamma, target_ess, uniform_mix),
        memory_budget_bytes=parse_bytes(memory_budget),
        on_error=on_error,
        strict=strict,
        limit=limit,
        allow_drift=allow_drift,
        trust_journal=trust_journal,
    )
    from embstore import info, pipeline, terminal  # noqa: PLC0415 - other commands start without them

    with terminal.TerminalObserver(Console(stderr=True, soft_wrap=not sys.stderr.isatty())) as observer:
        if dry_run:
            planned = pipeline.preflight(prompts, out=out, config=config, observer=observer)
            if as_json:
                _print_json(planned)
            return
        report = pipeline.build(prompts, out=out, config=config, resume=resume, observer=observer)
    if as_json:
        _print_json(report)
    else:
        terminal.print_report(terminal.results(), report, info.inspect(out))


@app.command()
@_reporting
def inspect(
    store: Store,
    neighbors: Annotated[
        str | None, typer.Option("--neighbors", help="Show the nearest distinct prompts of this id.")
    ] = None,
    by: Annotated[str | None, typer.Option("--by", help="Share of weight by this field of the input lines.")] = None,
    name: Annotated[str, typer.Option("--name", help="Which weights.")] = "default",
    as_json: AsJson = False,
) -> None:
    """What a store is, how far it is, and what its weights say. Instant, also while it is being built."""
    from embstore import info, terminal  # noqa: PLC0415

    if neighbors is not None:
        found = info.neighbors_of(store, neighbors)
        if as_json:
            _print_json(found)
        else:
            terminal.print_neighbors(terminal.results(), neighbors, found)
        return
    described = info.inspect(store, by=by, name=name)
    if as_json:
        _print_json(described)
    else:
        terminal.print_info(terminal.results(), described)


@app.command()
@_reporting
def verify(
    store: Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Demote damaged windows, so that build --resume computes them again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read everything back: every checksum, finiteness, norms, strays. Exits 3 if damaged, 6 if unfinished."""
    from embstore import info, terminal  # noqa: PLC0415

    report = info.verify(store, repair=repair)
    if as_json:
        _print_json(report)
    else:
        terminal.print_verify(terminal.results(), report, repaired=repair)
    if report.findings:
        raise typer.Exit(int(ExitCode.CORRUPT))
    if not report.is_complete:
        raise typer.Exit(int(ExitCode.INCOMPLETE))


@app.command()
@_reporting
def weights(
    store: Store,
    name: Annotated[
        str, typer.Option("--name", help="Keep these weights under a name, beside the default ones.")
    ] = "default",
    weighting: Method = "inverse-density",
    k: K = 10,
    gamma: Gamma = 1.0,
    target_ess: TargetEss = None,
    uniform_mix: UniformMix = 0.0,
    as_json: AsJson = False,
) -> None:
    """New weights from the neighbours a store already has, in seconds."""
    from embstore import artifact, info, terminal  # noqa: PLC0415

    metadata = artifact.recompute_weights(store, _weighting(weighting, k, gamma, target_ess, uniform_mix), name=name)
    if as_json:
        _print_json(metadata)
    else:
        terminal.print_info(terminal.results(), info.inspect(store, name=name))


@app.command()
@_reporting
def export(
    store: Store,
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.", show_default=False)],
    format: Annotated[
        Literal["npy", "kat"], typer.Option("--format", help="npy: float32 rows. kat: the original scripts' files.")
    ] = "npy",
    as_json: AsJson = False,
) -> None:
    """Write a finished store in another format, one entry per input line."""
    from embstore.export import export_store  # noqa: PLC0415

    files = export_store(store, out, format=format)
    if as_json:
        _print_json([str(file) for file in files])
    else:
        for file in files:
            Console().print(str(file), highlight=False, soft_wrap=True)


def _weighting(
    weighting: Literal["inverse-density", "legacy-inverse", "uniform"],
    k: int,
    gamma: float,
    target_ess: float | None,
    uniform_mix: float,
) -> WeightingConfig:
    return WeightingConfig(weighting=weighting, k=k, gamma=gamma, target_ess=target_ess, uniform_mix=uniform_mix)


def _print_json(value: object) -> None:
    def plain(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        return str(item)

    sys.stdout.write(printable_json(json.dumps(value, default=plain, indent=2, ensure_ascii=False)) + "\n")
