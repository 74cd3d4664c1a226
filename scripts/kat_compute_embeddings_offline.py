"""The offline pass over unique prompts: ``python -m scripts.kat_compute_embeddings_offline [--model MODEL]``.

Builds a store in the output folder; after a kill the same command continues it. The folder contains, under the original's
names, ``density_weights.npy``, ``ids.json``, ``embeddings_metadata.json`` and, on request, ``embeddings.npy``. Padding is
masked, so ``--batch_size`` changes no row. A prompt that fails stops the run or, with ``--on_error quarantine``, keeps its
row number with weight 0, so rows never shift against ids.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embstore.core.config import BuildConfig, EmbeddingConfig, WeightingConfig
from embstore.core.decode import printable
from embstore.core.errors import ConfigError
from embstore.core.events import Event, Notice, RowsCommitted
from embstore.core.files import array_header
from embstore.core.prompts import collapse_whitespace
from embstore.flow.build import BuildReport, build
from embstore.storage.atomic import DurableFile
from embstore.storage.reader import EmbeddingStore, open_store
from scripts.kat_files import PREFIXES, PROMPTS, STORE, data_folder, require, run

EMBEDDINGS = "embeddings.npy"

_MAX_TOKENS = 512
_MAKE_PREFIXES = "python -m scripts.kat_make_prefixes"


def main(arguments: Sequence[str] | None = None) -> BuildReport:
    """Build the store; returns the build's report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base_model_source", default="base", help="a nanochat checkpoint: base, mid, sft or rl")
    parser.add_argument("--model", help="a Hugging Face model instead: a folder or a hub id")
    parser.add_argument("--prompts_path", type=Path, help=f"default: {PREFIXES} or {PROMPTS} in {data_folder()}")
    parser.add_argument("--output_dir", type=Path, default=data_folder() / STORE, help="default: %(default)s")
    parser.add_argument("--k", type=int, default=10, help="nearest neighbours")
    parser.add_argument("--batch_size", type=int, help="prompts of 512 tokens per batch; default: chosen for the device")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one), cuda or cpu")
    parser.add_argument(
        "--on_error", choices=("stop", "quarantine"), default="stop", help="when a prompt fails in the model"
    )
    parser.add_argument(
        "--trust_tokenizer_pickle", action="store_true", help="open nanochat's tokenizer.pkl, which can run any code"
    )
    parser.add_argument(
        "--write_embeddings_npy", action="store_true", help=f"also write {EMBEDDINGS}: 4 bytes x vocabulary per prompt"
    )
    options = parser.parse_args(arguments)
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch_size must be at least 1, got {options.batch_size}")

    report = build(
        options.prompts_path or find_prompts(data_folder()),
        out=options.output_dir,
        model=options.model or f"nanochat:{options.base_model_source}",
        config=BuildConfig(
            embedding=EmbeddingConfig(
                device=options.device,
                max_tokens=_MAX_TOKENS,
                batch_tokens=_MAX_TOKENS * options.batch_size if options.batch_size else None,
                trust_tokenizer_pickle=options.trust_tokenizer_pickle or None,
            ),
            weighting=WeightingConfig(k=options.k),
            on_error=options.on_error,
        ),
        resume=True,
        observer=_show,
    )
    store = open_store(options.output_dir)
    if options.write_embeddings_npy:
        _write_rows(store, options.output_dir / EMBEDDINGS)
    _print_summary(report, store)
    return report


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


def _show(event: Event) -> None:
    if isinstance(event, Notice):
        print(f"{'warning' if event.is_warning else 'note'}: {printable(event.message)}")
    elif isinstance(event, RowsCommitted):
        rate = (event.stop - event.start) / event.seconds
        print(f"rows {event.start:,} to {event.stop:,} committed, {rate:.0f} prompts/s")


def _write_rows(store: EmbeddingStore, path: Path) -> None:
    """float32 [N, V] in the order of ``ids.json``; one chunk in memory at a time."""
    with DurableFile(path, sha256=False) as file:
        file.write(array_header(np.dtype("<f4"), (store.num_rows, store.spec.embedding.dimension)))
        for _, rows_BV in store.iter_rows():
            file.write(rows_BV.astype("<f4").data.cast("B"))


def _print_summary(report: BuildReport, store: EmbeddingStore) -> None:
    folder = report.store
    failed = int(str(report.metadata["failed_rows"]))
    print(f"{report.num_rows:,} prompts, {report.embedded_rows:,} embedded in this run; {failed} failed (weight 0)")
    for line in report.pool.lines_of_text():
        print(printable(line))
    for title, rows in (("rarest", report.rarest), ("most crowded", report.most_crowded)):
        for row, prompt in zip(rows, store.prompts.sample(rows), strict=True):
            text = printable(collapse_whitespace(prompt.rendered))
            print(f"  {title}: weight x {store.weights[row] * store.num_rows:.2f}  {text[:80]}")
    print(f"written: {folder}, a store with density_weights.npy, ids.json, prompts_list.json, embeddings_metadata.json")
    print(f"next: python -m scripts.kat_train_grpo --use_precomputed_embeddings --embeddings_dir {folder}")


if __name__ == "__main__":
    run(main)
