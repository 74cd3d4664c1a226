"""Python of the pages about trainers: run as it stands on the page, in a folder with what the pages name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import build_small, write_lines

_PAGES = Path(__file__).parents[2] / "docs" / "train"


def run_page(name: str, folder: Path) -> dict[str, Any]:
    """Run the page's Python, block after block; ``folder`` is the working directory, and gets MODEL, STORE, prompts.jsonl.

    Returns
    -------
    dict
        The names that it defined.
    """
    save_model(folder / "MODEL", make_model("llama"), make_tokenizer(template=True))
    lines = [{"id": f"q{row}", "prompt": f"Explain number {row}."} for row in range(24)]
    build_small(write_lines(folder / "prompts.jsonl", lines), folder / "STORE")
    page = (_PAGES / f"{name}.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, f"{name}.md", "exec"), names)
    return names
