"""The offline pass over unique prompts: ``python -m scripts.kat_compute_embeddings_offline [--model MODEL]``.

Builds a store in the output folder; after a kill the same command continues it. The folder contains, under the original's
names, ``embeddings.npy`` where the disk has room for it, ``density_weights.npy``, ``ids.json``, ``prompts_list.json`` and
``embeddings_metadata.json``. Padding is masked, so ``--batch_size`` moves a row only in its low bits. A prompt that fails
stops the run or, with ``--on_error quarantine``, keeps its row number with weight 0, so rows never shift against ids.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from numpy.typing import NDArray

from embstore.cli.options import takes
from embstore.core.config import BuildConfig, EmbeddingConfig, WeightingConfig, format_bytes
from embstore.core.decode import printable
from embstore.core.errors import ConfigError, PromptError, StorageError, StoreExistsError
from embstore.core.events import Event, Notice, RowsCommitted
from embstore.core.files import storage_errors
from embstore.core.format import JOURNAL, METADATA_LINK, PROMPTS_LIST, ROWS_COPY, WEIGHTS_LINK, document
from embstore.core.prompts import collapse_whitespace
from embstore.core.spec import StoreSpec
from embstore.flow.array_import import import_array
from embstore.flow.build import BuildReport, build
from embstore.storage.atomic import make_directory, save_array, write_durable
from embstore.storage.journal import read_journal
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.storage.rows_copy import copy_bytes, copy_problem, has_copy, shape_of, write_copy
from embstore.storage.writer import StoreWriter, may_begin_again, read_spec
from scripts.kat_files import PREFIXES, PROMPTS, STORE, data_folder, read_lines, require, run
from scripts.kat_hints import own_hints

if TYPE_CHECKING:
    import torch

_MAX_TOKENS = 512
_MAKE_PREFIXES = "python -m scripts.kat_make_prefixes"
_SPARE_BYTES = 256 << 20  # left free by embeddings.npy
# quotas, and the largest file of a FAT file system, are not seen before
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> BuildReport:
    """Build the store; returns the build's report."""
    parser = _parser()
    with own_hints(parser, {_underscored(flag) for each in _build_options().params for flag in each.opts}):
        given = None if arguments is None else [_underscored(argument) for argument in arguments]
        options, more = parser.parse_known_args(given)
        report = _build(options, _config_of(more))
        store = open_store(options.output_dir)
        _print_summary(report, store)
        if options.embeddings_npy:
            print(_copy_rows(options.output_dir, insists=options.embeddings_npy == "insist"))
        names = f"{WEIGHTS_LINK}, ids.json, {PROMPTS_LIST}, {METADATA_LINK}"
        print(f"written: {report.store}, a store with {names}")
        print(f"next: python -m scripts.kat_train_grpo --use_precomputed_embeddings --embeddings_dir {report.store}")
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="All options of embstore build work, too (embstore build --help-all), such as --memory_budget 4GiB, "
        "--allow_drift, --reuse STORE, and --weighting legacy-inverse, the original's formula: crowded prompts up.",
    )
    add = parser.add_argument
    add("--base_model_source", help="a nanochat checkpoint: base (the default), mid, sft or rl")
    add("--model", help="a Hugging Face model instead: a folder or a hub id. A rerun without either takes the store's")
    add("--prompts_path", help=f"default: {PREFIXES} or {PROMPTS} in {data_folder()}")
    add("--output_dir", type=Path, default=data_folder() / STORE, help="default: %(default)s")
    add("--k", type=int, default=10, help="nearest neighbours")
    add(
        "--batch_size",
        type=int,
        help=f"prompts of {_MAX_TOKENS} tokens per batch; default: chosen for the device. A rerun takes the store's",
    )
    add("--device", default="auto", help="auto (cuda if there is one), cuda or cpu")
    add("--on_error", choices=("stop", "quarantine"), default="stop", help="when a prompt fails in the model")
    add("--trust_tokenizer_pickle", action="store_true", help="open nanochat's tokenizer.pkl, which can run any code")
    add(
        "--no_embeddings_npy",
        dest="embeddings_npy",
        action="store_const",
        const=None,
        default="if it fits",
        help=f"leave out {ROWS_COPY}: 4 bytes x vocabulary per prompt, by default written if the disk has room",
    )
    add("--write_embeddings_npy", dest="embeddings_npy", action="store_const", const="insist", help=argparse.SUPPRESS)
    return parser


def find_prompts(folder: Path) -> Path:
    """The file of unique prompts in a data folder, in either format.

    Raises
    ------
    PromptError
        There is no such file.
    ConfigError
        There are files in both formats.
    """
    found = [folder / name for name in (PREFIXES, PROMPTS) if (folder / name).exists()]
    if len(found) > 1:
        raise ConfigError(f"{folder} has both {PREFIXES} and {PROMPTS}", hint="name one of them with --prompts_path")
    return found[0] if found else require(folder / PREFIXES, command=_MAKE_PREFIXES)


def _build(options: argparse.Namespace, config: BuildConfig) -> BuildReport:
    """Build or continue the store: ``config`` has the options of ``embstore build`` that have no other name here."""
    begun = _begun(options.output_dir)
    source = options.base_model_source or ("base" if begun is None else None)
    embedding = dataclasses.replace(
        config.embedding,
        model=options.model or (f"nanochat:{source}" if source else None),
        device=options.device,
        max_tokens=config.embedding.max_tokens or _MAX_TOKENS,
        trust_tokenizer_pickle=options.trust_tokenizer_pickle or None,
    )
    return build(
        _prompts(options, begun),
        out=options.output_dir,
        config=dataclasses.replace(
            config,
            embedding=dataclasses.replace(embedding, batch_tokens=_batch_tokens(options, embedding, begun)),
            weighting=dataclasses.replace(config.weighting, k=options.k),
            on_error=options.on_error,
        ),
        resume=True,
        observer=_show,
    )


def _begun(folder: Path) -> StoreSpec | None:
    """The settings of a store that this run continues; None if it begins one."""
    state = read_journal(folder)
    return None if state.spec is None or may_begin_again(folder, state) else read_spec(folder, state)


def _prompts(options: argparse.Namespace, begun: StoreSpec | None) -> str | Path | None:
    """The file that was named, or that of the data folder; a store can be continued without one."""
    if options.prompts_path:
        return str(options.prompts_path)
    try:
        return find_prompts(data_folder())
    except PromptError:
        if begun is None:
            raise
        return None


def _batch_tokens(options: argparse.Namespace, embedding: EmbeddingConfig, begun: StoreSpec | None) -> int | None:
    if options.batch_size is None:
        return embedding.batch_tokens
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size must be at least 1, got {options.batch_size}")
    asked: int = (embedding.max_tokens or _MAX_TOKENS) * options.batch_size
    if begun is None or begun.embedding.batch_tokens == asked:
        return asked
    stored = begun.embedding.batch_tokens
    print(
        f"note: --batch_size {options.batch_size} ({asked} tokens) is not used: {options.output_dir} was begun with "
        f"batches of {stored} tokens, and keeps them"
    )
    return None


def _underscored(argument: str) -> str:
    """A flag as these scripts spell it; whatever else is given stays as it is."""
    flag, equals, value = argument.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else argument


@functools.cache
def _build_options() -> Any:  # noqa: ANN401 - typer's own click has no public name
    """A command with the options of ``embstore build``; it appends their config to its ``obj``."""

    @takes(BuildConfig)
    def collect(context: typer.Context, *, config: BuildConfig) -> None:
        context.obj.append(config)

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(collect)
    return typer.main.get_command(app)


def _config_of(arguments: Sequence[str]) -> BuildConfig:
    """The config that the options of ``embstore build`` make; one that it does not have is a usage error."""
    configs: list[BuildConfig] = []
    spelled = [f"--{each[2:].replace('_', '-')}" if each.startswith("--") else each for each in arguments]
    try:
        _build_options()(spelled, prog_name="kat_compute_embeddings_offline", obj=configs)
    except SystemExit:  # also after a success
        if not configs:
            raise
    return configs[0]


def _show(event: Event) -> None:
    if isinstance(event, Notice):
        print(f"{'warning' if event.is_warning else 'note'}: {printable(event.message)}")
    elif isinstance(event, RowsCommitted):
        rate = (event.stop - event.start) / event.seconds
        print(f"rows {event.start:,} to {event.stop:,} committed, {rate:.0f} prompts/s")


def _copy_rows(folder: Path, *, insists: bool) -> str:
    """Write ``embeddings.npy`` where the disk has room, and the metadata that describe it; returns what to say of it."""
    with StoreWriter(folder, resume=True) as writer:
        store = open_store(folder)
        shape = shape_of(store)
        is_there = has_copy(folder, shape) and copy_problem(store) is None
        problem = None if is_there else _replace_copy(store, insists=insists)
        writer.refresh_links(store.published)
    size = format_bytes(copy_bytes(shape))
    if problem is not None:
        return f"note: {ROWS_COPY} ({size}) is not written: {problem}. The store has the rows; training needs only weights"
    return f"{ROWS_COPY}: float32 {shape[0]} x {shape[1]}, {size} (--no_embeddings_npy leaves it out)"


def _replace_copy(store: EmbeddingStore, *, insists: bool) -> str | None:
    """Write a new copy in place of one that is not right. Returns why there is no room for it, or None."""
    path = store.root / ROWS_COPY
    with storage_errors("replacing", path):
        path.unlink(missing_ok=True)
    free_bytes = shutil.disk_usage(store.root).free
    if not insists and copy_bytes(shape_of(store)) + _SPARE_BYTES > free_bytes:
        return f"the disk has {format_bytes(free_bytes)} free"
    try:
        write_copy(store)
    except StorageError as error:
        if insists or error.errno not in _NO_ROOM:
            raise
        return str(error)
    return None


def _print_summary(report: BuildReport, store: EmbeddingStore) -> None:
    failed = int(str(report.metadata["failed_rows"]))
    print(f"{report.num_rows:,} prompts, {report.embedded_rows:,} embedded in this run; {failed} failed (weight 0)")
    for line in report.pool.lines_of_text():
        print(printable(line))
    for title, rows in (("rarest", report.rarest), ("most crowded", report.most_crowded)):
        for row, prompt in zip(rows, store.prompts.sample(rows), strict=True):
            text = printable(collapse_whitespace(prompt.rendered))
            print(f"  {title}: weight x {store.weights[row] * store.num_rows:.2f}  {text[:80]}")


# --- the original's four functions, for code that imports them ---------------------------------------------------------


def load_prompts(prompts_path: str | Path) -> list[str]:
    """The texts of a prompts file, in its order; lines without a prompt are reported and left out."""
    prompts = [line.prompt.rendered for line in read_lines(Path(prompts_path), report=print)]
    if not prompts:
        raise PromptError(f"{prompts_path} has no prompts", hint="run python -m scripts.kat_make_prompts")
    return prompts


def compute_embeddings(
    prompts: Sequence[str],
    base_model: torch.nn.Module,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    device: torch.device | str,
    batch_size: int = 8,
) -> NDArray[np.float32]:
    """Rows float32 [len(prompts), V] of unit length, rounded to float16 like those of a store. All are in memory."""
    from embstore.model.source import InMemorySource  # noqa: PLC0415 - imports torch

    config = BuildConfig(
        embedding=EmbeddingConfig(device=str(device), max_tokens=_MAX_TOKENS, batch_tokens=_MAX_TOKENS * batch_size),
        strict=True,
    )
    with tempfile.TemporaryDirectory(prefix="kat-embeddings-") as scratch:
        file, out = Path(scratch) / PROMPTS, Path(scratch) / STORE
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts), encoding="utf-8")
        build(file, out=out, config=config, source=InMemorySource(base_model, tokenizer))
        store = open_store(out)
        emb_NV = np.concatenate([emb_BV.astype(np.float32) for _, emb_BV in store.iter_rows()])
        return emb_NV[np.asarray(store.line_rows)]


def compute_density_weights(embeddings: NDArray[np.floating[Any]], k: int = 10) -> NDArray[np.float32]:
    """Weights float32 [N] of sum 1 for rows [N, V]: large for rare rows, which the original's formula made small."""
    with tempfile.TemporaryDirectory(prefix="kat-weights-") as scratch:
        np.save(Path(scratch) / ROWS_COPY, embeddings)
        out = Path(scratch) / STORE
        import_array(Path(scratch) / ROWS_COPY, out=out, config=BuildConfig(weighting=WeightingConfig(k=k)))
        return np.array(open_store(out).weights)


def save_embeddings(
    embeddings: NDArray[np.floating[Any]],
    weights: NDArray[np.floating[Any]],
    prompts: Sequence[str],
    output_dir: str | Path,
    model_config: dict[str, Any],
    *,
    direction: str = "distance up, density down, weight up",
) -> None:
    """Write the original's four files, which ``kat_train_grpo`` reads, too. A store is not overwritten.

    ``direction`` is what the weights of ``compute_density_weights`` have.
    """
    folder = Path(output_dir)
    if not len(embeddings) == len(weights) == len(prompts):
        raise ConfigError(
            f"{len(embeddings)} rows, {len(weights)} weights and {len(prompts)} prompts do not belong together"
        )
    if os.path.lexists(folder / JOURNAL):
        raise StoreExistsError(f"{folder} contains a store", hint="choose another --output_dir")
    make_directory(folder)
    save_array(folder / ROWS_COPY, np.asarray(embeddings, dtype=np.float32))
    save_array(folder / WEIGHTS_LINK, np.asarray(weights, dtype=np.float32))
    write_durable(folder / PROMPTS_LIST, document(list(prompts)))
    statistics = {f"weights_{name}": float(getattr(np, name)(weights)) for name in ("min", "max", "mean", "std")}
    metadata = {
        "n_prompts": len(prompts),
        "embedding_dim": embeddings.shape[1],
        "embedding_dtype": "float32",
        "weights_dtype": "float32",
        "model_vocab_size": model_config.get("vocab_size"),
        "model_n_embd": model_config.get("n_embd"),
        "normalization": "L2 unit vectors",
        **statistics,
        "direction": direction,
    }
    write_durable(folder / METADATA_LINK, document(metadata))


if __name__ == "__main__":
    run(main)
