"""What ``make demo`` leaves, made small: prompts from docstrings, a tokenizer and a Llama that trained for two seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.demo_input import make_demo_input


@pytest.fixture(scope="session")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``prompts.jsonl`` and ``model``; read it, never write to it."""
    folder = tmp_path_factory.mktemp("demo") / "demo_output"
    make_demo_input(folder, limit=240, seconds=2.0)
    return folder
