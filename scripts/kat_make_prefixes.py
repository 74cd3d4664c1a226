"""Unique prompts of a file of pairs, as conversations: ``python -m scripts.kat_make_prefixes``.

Reads ``pairs_all.jsonl`` and writes to the same folder ``prefixes_all.jsonl`` (``{"id", "prefix"}``, in first-seen order),
``prefix_id_map.tsv`` (id, tab, first user message) and ``stats.txt``. Prompts are the same if their first user messages are
equal up to whitespace; the first conversation of each is kept. ``kat_make_prompts`` writes the older format.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from embstore.core.decode import printable
from embstore.core.errors import PromptError
from embstore.storage.atomic import DurableFile
from scripts.kat_files import PAIRS, PREFIX_MAP, PREFIXES, STATS, PromptLine, data_folder, read_lines, require, run
from scripts.kat_hints import own_hints


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the three files, or raise an error that names what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    write_unique(parser, arguments, PREFIXES, PREFIX_MAP, _prefix)


def _prefix(line: PromptLine) -> dict[str, object]:
    if line.prompt.messages is not None:
        beside = {name: value for name, value in line.record.items() if name != "messages" and value is not None}
        return {"prefix": {"messages": line.messages}, **beside}
    return {"prefix": {"messages": [{"role": "user", "content": line.first_user_text}]}}


def write_unique(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    prompts: str,
    id_map: str,
    content: Callable[[PromptLine], dict[str, object]],
) -> None:
    """Write one line per distinct prompt of the pairs to ``prompts``; ``content`` gives the fields besides the id.

    Raises
    ------
    PromptError
        There is no file of pairs, or none of its lines has a user message.
    """
    parser.add_argument("--pairs_path", type=Path, default=data_folder() / PAIRS, help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, help="default: the folder of the pairs")
    with own_hints(parser):
        _write(parser.parse_args(arguments), prompts, id_map, content)


def _write(
    options: argparse.Namespace, prompts: str, id_map: str, content: Callable[[PromptLine], dict[str, object]]
) -> None:
    pairs = require(options.pairs_path, command="python -m scripts.kat_download_pairs")
    folder: Path = options.output_dir or pairs.parent
    folder.mkdir(parents=True, exist_ok=True)

    seen: set[str] = set()
    sources: Counter[str] = Counter()
    without_user = 0
    with DurableFile(folder / prompts) as prompt_file, DurableFile(folder / id_map) as map_file:
        for line in read_lines(pairs, report=print):
            if not line.first_user_text:
                without_user += 1
                continue
            sources[line.source] += 1
            # derived from the text, not from the pair's id: equal texts are the same prompt
            prompt_id = line.prompt.derived_id
            if prompt_id in seen:
                continue
            seen.add(prompt_id)
            record = {"id": prompt_id, **content(line)}
            prompt_file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            map_file.write(f"{prompt_id}\t{line.first_user_text}\n".encode())
        if not seen:
            raise PromptError(f"{pairs} has no prompt with a user message", hint="run python -m scripts.kat_download_pairs")
    total = sources.total()
    statistics = [
        f"total_pairs: {total}",
        f"unique_{prompts.partition('_')[0]}: {len(seen)}",
        f"dedup_ratio: {len(seen) / total:.2%}",
        f"source_breakdown: {dict(sources)}",
    ]
    with DurableFile(folder / STATS) as file:
        file.write("".join(f"{statistic}\n" for statistic in statistics).encode())
    if without_user:
        print(f"warning: skipped {without_user} pairs without a user message")
    print("\n".join(printable(statistic) for statistic in statistics))
    print(f"written: {folder / prompts}, {folder / id_map}, {folder / STATS}")
    print(f"next: python -m scripts.kat_compute_embeddings_offline --prompts_path {folder / prompts}")


if __name__ == "__main__":
    run(main)
