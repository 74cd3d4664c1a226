"""A pool joins completely to the store that was built from it, whoever wrote it and whatever reads it back."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from embstore.core.config import CURRENT_RULE, USUAL_FIELDS
from embstore.core.prompts import Prompt
from embstore.storage.prompt_source import open_source
from embstore.training import prompt_keys
from tests.support.pools import WRITERS, Record, pools

Reader = Callable[[Path], Any]


def _with_datasets(source: Path) -> Any:
    import datasets

    if source.is_dir():
        return datasets.load_from_disk(str(source))
    cache = {"cache_dir": str(source.parent / "cache")}
    return (datasets.Dataset.from_parquet if _is_parquet(source) else datasets.Dataset.from_json)(str(source), **cache)


def _with_pandas(source: Path) -> Any:
    import pandas as pd

    return (
        pd.read_parquet(source) if _is_parquet(source) else pd.read_json(source, lines=True, dtype=False, precise_float=True)
    )


def _with_pyarrow(source: Path) -> Any:
    import pyarrow.json
    import pyarrow.parquet

    return pyarrow.parquet.read_table(source) if _is_parquet(source) else pyarrow.json.read_json(source)


def _with_polars(source: Path) -> Any:
    import polars as pl

    return pl.read_parquet(source) if _is_parquet(source) else pl.read_ndjson(source, infer_schema_length=None)


def _with_json(source: Path) -> Any:
    return [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line]


def _is_parquet(source: Path) -> bool:
    return source.read_bytes()[:4] == b"PAR1"


def _ways() -> list[Any]:
    """Every writer with every reader of what it writes."""
    installed = [name for name in ("datasets", "pandas", "pyarrow", "polars") if importlib.util.find_spec(name)]
    readers: dict[str, Reader] = {
        "datasets": _with_datasets,
        "pandas": _with_pandas,
        "pyarrow": _with_pyarrow,
        "polars": _with_polars,
        "json": _with_json,
    }
    found = []
    for writer in WRITERS:
        is_folder = writer in ("datasets, Arrow", "datasets, List(Json)")
        is_lines = "JSON lines" in writer or writer in ("json", "datasets, JSON")
        names = ["datasets"] if is_folder else [*installed, *["json"] * is_lines]
        found += [pytest.param(writer, readers[name], id=f"{writer} read with {name}") for name in names]
    return found


@pytest.mark.parametrize(("writer", "read"), _ways())
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(records=pools())
def test_what_was_built_is_found_again(writer: str, read: Reader, records: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = WRITERS[writer](Path(scratch) / "pool", records)
        with open_source(source, USUAL_FIELDS, CURRENT_RULE) as prompts:
            built = [prompt.digest for prompt in prompts if isinstance(prompt, Prompt)]
        assert len(built) == len(records)
        keys = [int.from_bytes(digest[:8], "little") for digest in built]
        dataset = read(source)
        assert prompt_keys(dataset).tolist() == keys
        for each in (dataset.select(range(len(records) - 1, -1, -1)),) if hasattr(dataset, "select_columns") else ():
            assert prompt_keys(each).tolist() == keys[::-1]
