"""Unique prompts of a file of pairs, as plain text: ``python -m scripts.kat_make_prompts``.

This is the older format: ``prompts_all.jsonl`` has lines ``{"id", "prompt"}`` with the whitespace-collapsed first
user message, ``prompt_id_map.tsv`` maps its ids. Ids are those of ``kat_make_prefixes``, so weights of either join the same
pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from scripts.kat_files import PROMPT_MAP, PROMPTS, run
from scripts.kat_make_prefixes import write_unique


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the three files, or raise an error that names what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    write_unique(parser, arguments, PROMPTS, PROMPT_MAP, lambda line: {"prompt": line.first_user_text})


if __name__ == "__main__":
    run(main)
