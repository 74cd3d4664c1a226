"""``embstore build``: the main job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from embstore.cli.frame import AsJson, app, print_json, reporting
from embstore.cli.searching import Center, Knn, Shards
from embstore.cli.storing import ChunkRows, CompressorOption, Resume, Threads, TrustJournal, WindowRows
from embstore.cli.weighting import CopiesOf, Gamma, K, MaxRatio, Method, TargetEss, UniformMix, weighting_config
from embstore.cli.workers import Devices, EngineName, GpusPerWorker, NumWorkers, RayAddress, engine_config
from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig, Pooling, PromptFields, Space, parse_bytes


@app.command()
@reporting
def build(
    prompts: Annotated[
        str | None,
        typer.Argument(help="JSONL, also gzipped, or - for stdin; Parquet; a saved dataset. Not needed on a resume."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the store.", show_default=False)] = ...,  # type: ignore[assignment]
    model: Annotated[str | None, typer.Option("--model", help="Folder or hub id of a causal LM.")] = None,
    resume: Resume = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"] | None,
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
    compressor: CompressorOption = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", help="Padded tokens in a batch; default on a CPU 1024, in 16 bits 2048.")
    ] = None,
    window_rows: WindowRows = None,
    chunk_rows: ChunkRows = None,
    threads: Threads = None,
    trust_tokenizer_pickle: Annotated[
        bool | None,
        typer.Option("--trust-tokenizer-pickle", help="Unpickle nanochat's tokenizer.pkl, which can run any code."),
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code/--no-trust-remote-code", help="Run the model's own code; recorded.")
    ] = None,
    memory_budget: Annotated[str, typer.Option("--memory-budget", help="Anonymous memory above the loaded model.")] = "2GiB",
    knn: Knn = "auto",
    shards: Shards = None,
    center: Center = False,
    weighting: Method = "inverse-density",
    k: K = 10,
    gamma: Gamma = 1.0,
    target_ess: TargetEss = None,
    uniform_mix: UniformMix = 0.0,
    max_ratio: MaxRatio = 10.0,
    duplicates: CopiesOf = "collapse",
    text_field: Annotated[str | None, typer.Option("--text-field", help="Field with the text; default prompt.")] = None,
    messages_field: Annotated[
        str | None, typer.Option("--messages-field", help="Field with the list of messages; default messages.")
    ] = None,
    id_field: Annotated[str | None, typer.Option("--id-field", help="Field with the id; default id.")] = None,
    on_error: Annotated[
        Literal["stop", "quarantine"],
        typer.Option("--on-error", help="A prompt that fails in the model: stop, or keep its row empty."),
    ] = "stop",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse the file if any line holds no prompt.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N distinct prompts.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and cost; write nothing.")] = False,
    allow_drift: Annotated[
        bool,
        typer.Option(
            "--allow-drift", help="Resume on other hardware or threads, or without stores to reuse; voids byte identity."
        ),
    ] = False,
    reuse: Annotated[
        list[str] | None,
        typer.Option("--reuse", help="Finished store whose rows are copied where a prompt is the same; repeatable."),
    ] = None,
    trust_journal: TrustJournal = False,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    num_workers: NumWorkers = None,
    gpus_per_worker: GpusPerWorker = None,
    devices: Devices = None,
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
        density=DensityConfig(knn=knn, shards=shards, center=center),
        weighting=weighting_config(weighting, k, gamma, target_ess, uniform_mix, max_ratio, duplicates),
        memory_budget_bytes=parse_bytes(memory_budget),
        on_error=on_error,
        strict=strict,
        limit=limit,
        allow_drift=allow_drift,
        trust_journal=trust_journal,
        reuse=tuple(reuse or ()),
        fields=PromptFields(text=text_field, messages=messages_field, id=id_field),
        engine=engine_config(engine, ray_address, num_workers, gpus_per_worker, devices),
    )
    from embstore.flow import build as build_flow  # noqa: PLC0415 - other commands start without them
    from embstore.views import info, terminal  # noqa: PLC0415 - other commands start without them

    with terminal.TerminalObserver(Console(stderr=True, soft_wrap=not sys.stderr.isatty())) as observer:
        if dry_run:
            planned = build_flow.preflight(prompts, out=out, config=config, observer=observer)
            if as_json:
                print_json(planned)
            return
        report = build_flow.build(prompts, out=out, config=config, resume=resume, observer=observer)
    if as_json:
        print_json(report)
    else:
        terminal.print_report(terminal.results(), report, info.inspect(out))
