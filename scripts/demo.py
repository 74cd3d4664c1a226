"""``make demo``: the main job end to end, on generated input. No models or data are downloaded.

The demo makes prompts, a tokenizer and a small Llama from the standard library's docstrings; builds a store; kills the build
with SIGKILL; resumes it; inspects and verifies the store; and trains with its weights, first in a plain loop, then for five
steps of GRPO. It prints every command that it runs; the commands work in the same way on your own prompts and model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.rule import Rule

from scripts.demo_input import DemoInput, make_demo_input

_WINDOW_ROWS = 512  # small windows, so that a demo of a few thousand prompts has several to resume
_console = Console()
# the demo needs no network, so libraries must not try to use it
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def main() -> int:
    """Run every step; returns the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo_output"), help="output folder; it is emptied first")
    parser.add_argument("--prompts", type=int, default=3000, help="number of prompts")
    parser.add_argument("--train-seconds", type=float, default=45.0, help="how long the small Llama trains")
    options = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(options.folder, ignore_errors=True)

    _title("1. Make the input: docstrings of the standard library, a tokenizer and a small Llama")
    made = _make_input(options.folder, options.prompts, options.train_seconds)
    _console.print(
        f"{made.num_prompts:,} prompts in {made.prompts}, a model in {made.model} (loss {made.loss:.2f})", highlight=False
    )

    store = options.folder / "store"
    build = ["build", str(made.prompts), "--model", str(made.model), "--out", str(store)]
    build += ["--window-rows", str(_WINDOW_ROWS), "--chunk-rows", str(_WINDOW_ROWS // 2)]

    _title("2. Build the store, and kill it with SIGKILL after the second committed window")
    _kill_part_way(build, store)
    _embstore("inspect", str(store))

    _title("3. Resume: committed rows are not computed again")
    _embstore(*build, "--resume")

    _title("4. Inspect the store, and verify every byte")
    _embstore("inspect", str(store), "--by", "src", head=32)
    _embstore("verify", str(store))

    _title("5. A sharper weighting from the same neighbours, without a new search")
    _embstore("weights", str(store), "--target-ess", "0.5", head=7)

    _title("6. Train: map the weights, draw batches by them (scripts/demo_train.py)")
    _run([sys.executable, "-m", "scripts.demo_train", str(store), str(made.model)])

    _title("7. GRPO by TRL, on groups of completions to prompts drawn by density: 5 steps")
    _train_grpo(options.folder, made, store)

    seconds = time.monotonic() - started
    _title(f"Done in {seconds:.0f} s. The store is in {store}; the same commands work on your prompts and model.")
    return 0


def _make_input(folder: Path, num_prompts: int, seconds: float) -> DemoInput:
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=30),
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]:.2f}"),
    )
    with Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal) as progress:
        task = progress.add_task("training", total=seconds, step=0, loss=0.0)

        def observe(elapsed: float, step: int, loss: float) -> None:
            progress.update(task, completed=elapsed, step=step, loss=loss)

        return make_demo_input(folder, limit=num_prompts, seconds=seconds, observer=observe)


def _kill_part_way(build: list[str], store: Path) -> None:
    """Start a build and SIGKILL it once its journal holds two window commits."""
    _show(build)
    process = subprocess.Popen(_command(*build), env=os.environ | _OFFLINE)
    journal = store / "journal.jsonl"
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b'"record":"window"') >= 2:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    code = process.wait()
    if code != -signal.SIGKILL:
        raise SystemExit(f"the build ended with {code} before it could be killed")
    _console.print("[bold red]killed[/bold red] (SIGKILL: no handler ran and nothing was flushed)\n")


def _train_grpo(folder: Path, made: DemoInput, store: Path) -> None:
    arguments = ["-m", "scripts.kat_train_grpo", "--model", str(made.model), "--prompts_path", str(made.prompts)]
    arguments += ["--use_precomputed_embeddings", "--embeddings_dir", str(store), "--require_density"]
    arguments += ["--reward", "format", "--max_steps", "5", "--log_interval", "1", "--lr", "1e-4"]
    arguments += ["--device_batch_size", "16", "--num_generations", "4", "--max_completion_tokens", "32"]
    arguments += ["--out_dir", str(folder / "grpo")]
    _console.print(f"[bold cyan]$ python {' '.join(arguments)}[/bold cyan]", highlight=False, soft_wrap=True)
    _run([sys.executable, *arguments])


def _embstore(*arguments: str, head: int | None = None) -> None:
    _show(list(arguments))
    _run(_command(*arguments), head=head)


def _command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("embstore")), *arguments]


def _show(arguments: list[str]) -> None:
    _console.print(f"[bold cyan]$ embstore {' '.join(arguments)}[/bold cyan]", highlight=False, soft_wrap=True)


def _run(command: list[str], *, head: int | None = None) -> None:
    """Run a command that must succeed; with ``head``, show only that many lines of its output."""
    sys.stdout.flush()
    process = subprocess.run(
        command, env=os.environ | _OFFLINE, check=False, text=True, stdout=subprocess.PIPE if head else None
    )
    if head:
        lines = process.stdout.splitlines()
        _console.print("\n".join(lines[:head]), highlight=False, markup=False, soft_wrap=True)
        if len(lines) > head:
            _console.print(f"  ... {len(lines) - head} more lines", style="dim")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    _console.print()


def _title(text: str) -> None:
    _console.print(Rule(style="dim"))
    _console.print(f"[bold]{text}[/bold]\n", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
