"""Recipes of docs/train: their commands are run as they are written, on a small file; trainers get their settings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from embstore.cli import app
from embstore.training import load_weights, resample_indices
from tests.support.models import make_model, make_tokenizer, save_model

ROOT = Path(__file__).parents[2]
ITEMS = 40
DRAWS = 48


class Recipe:
    """A page's commands in a folder of their own, which is the current one.

    ``rows`` are the trainer's dataset. After ``draw``, ``order`` has the number of the row of each draw.
    """

    def __init__(self, page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text = (ROOT / "docs" / "train" / f"{page}.md").read_text(encoding="utf-8")
        self.folder = folder
        self.order: list[int] = []
        monkeypatch.chdir(folder)

    def blocks(self, language: str) -> list[str]:
        """Fenced blocks of a language."""
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)

    def words(self, start: str) -> list[str]:
        """The words of the page's one shell command that starts so, without its program."""
        lines = [line for body in self.blocks("sh") for line in body.replace("\\\n", " ").splitlines()]
        (line,) = [line for line in lines if line.startswith(start)]
        return shlex.split(line.removeprefix(start))

    def draw(self, rows: Sequence[dict[str, Any]], *, draws: int = DRAWS, id_column: str | None = None) -> Path:
        """Run the page's build and resample on these rows with a small model; the drawn file."""
        build, resample = (
            shlex.split(line)[1:] for line in re.findall(r"^    (embstore (?:build|resample) .*)", self.text, re.MULTILINE)
        )
        source = self.folder / build[1]
        source.parent.mkdir(exist_ok=True)
        write(source, rows)
        save_model(self.folder / "MODEL", make_model("llama"), make_tokenizer(template=True))
        resample[resample.index("--num-samples") + 1] = str(draws)
        for words in (build, resample):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, f"{words}\n{done.output}"
        self.order = self.plan(rows, draws=draws, id_column=id_column).tolist()
        assert len(set(self.order)) < draws  # some rows are drawn more than once
        return self.folder / resample[resample.index("--out") + 1]

    def plan(self, rows: Sequence[dict[str, Any]], *, draws: int, id_column: str | None = None) -> NDArray[Any]:
        """The draws of the sampler itself."""
        return resample_indices(load_weights("STORE").for_dataset(rows, id_column=id_column), draws, seed=0)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows in the format of the file's name."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def number_in(text: str) -> int:
    """The number of the row whose prompt is in this text."""
    (found,) = set(re.findall(r"row (\d+)!", text))
    return int(found)
