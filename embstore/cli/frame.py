"""What all commands share: the application, common options, errors and exit codes, signals, results as JSON."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

from embstore import __version__
from embstore.core.decode import printable, printable_json
from embstore.core.errors import EmbstoreError, ExitCode, StorageError
from embstore.core.events import Preflight
from embstore.host.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from embstore.flow.build import BuildReport

_Arguments = ParamSpec("_Arguments")

app = typer.Typer(
    name="embstore",
    help="Offline embedding and density store for LLM post-training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Store = Annotated[Path, typer.Argument(help="Folder of the store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel="general")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the store.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an unfinished store, or start a new one.")]


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Any signal to stop ends the process as if by Ctrl-C."""
    # not SIG_IGN yet: Python complains if a signal that it has already caught is then ignored
    for each in STOP_SIGNALS:
        signal.signal(each, _stopping)
    raise KeyboardInterrupt


def _stopping(number: int, frame: FrameType | None) -> None:
    """Another signal while the process is stopping."""


def _ignore_signals() -> None:
    """Keep a late signal from spoiling the message and the exit code. Handlers of a caller stay."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (stop, _stopping):
            signal.signal(number, signal.SIG_IGN)


def reporting(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Print an expected error as two lines and exit with its code; anything else is a bug and keeps its traceback."""
    resumes = "resume" in inspect.signature(command).parameters

    @functools.wraps(command)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            _report(lambda: command(*args, **kwargs), resumes=resumes and not kwargs.get("dry_run"))
        except KeyboardInterrupt:
            _ignore_signals()
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None

    return run


def _report(command: Callable[[], None], *, resumes: bool) -> None:
    """``resumes``: a store is being made, which the same command continues after a failure of the file system."""
    try:
        command()
    except EmbstoreError as error:
        _ignore_signals()
        code, hint = error.exit_code, error.hint
        if isinstance(error, StorageError) and code == ExitCode.INCOMPLETE:
            if not resumes:
                code = ExitCode.ERROR
            elif hint and "--resume" not in hint:
                hint += ": with --resume it continues where it stopped"
        console = Console(stderr=True, soft_wrap=True, emoji=False)
        console.print(f"[bold red]error[/bold red]: {escape(printable(str(error)))}", highlight=False)
        if hint:
            console.print(f"[bold]hint[/bold]: {escape(printable(hint))}", highlight=False)
        raise typer.Exit(int(code)) from None


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


def run_and_print(work: Callable[..., BuildReport | Preflight], out: Path, *, as_json: bool) -> None:
    """Run ``work(observer=...)`` with its progress on stderr; print the report of a build, and of a plan only its JSON."""
    sys.stderr.write(f"embstore {__version__}\n")  # the first word, before anything that takes seconds
    sys.stderr.flush()
    from embstore.views import info, progress, terminal  # noqa: PLC0415 - other commands start without them

    with progress.on_stderr() as observer:
        result = work(observer=observer)
    if as_json:
        print_json(result)
    elif not isinstance(result, Preflight):
        terminal.print_report(terminal.results(), result, info.inspect(out))


def replace_unencodable() -> None:
    """From here on, what stdout or stderr cannot encode is printed in another way; it would be a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors not in ("replace", "backslashreplace"):
            stream.reconfigure(errors="replace")


def print_json(value: object) -> None:
    """Print a result on stdout, for programs; in ASCII where stdout cannot encode it, so that it stays the same value."""

    def plain(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        return str(item)

    text = printable_json(json.dumps(value, default=plain, indent=2, ensure_ascii=False))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, default=plain, indent=2)
    sys.stdout.write(text + "\n")
