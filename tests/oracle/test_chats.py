"""Chats through a real model: rows depend neither on the file they came from nor on the day, time zone or process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embstore.core.config import BuildConfig, DensityConfig, EmbeddingConfig
from embstore.core.events import Event, RowsCommitted
from embstore.flow.build import build
from embstore.model.locate import locate_model
from embstore.model.source import TorchSource
from embstore.storage.reader import open_store
from tests.support.elsewhere import run_elsewhere
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.pools import WRITERS, Record
from tests.support.stores import Stopped, journal_records, snapshot

# the date to the second, then everything that a template can see
TEMPLATE = (
    "{{ strftime_now('%d %B %H:%M:%S') }}"
    "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}"
    "{% endfor %}{% endfor %}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
)
CONFIG = BuildConfig(
    embedding=EmbeddingConfig(dtype="float32", device="cpu", threads=1, chunk_rows=16, window_rows=16),
    density=DensityConfig(knn="exact"),
)
_RESUME = """
import sys
from embstore.flow.build import build
from tests.oracle.test_chats import CONFIG

build(None, out=sys.argv[1], model=sys.argv[2], config=CONFIG, resume=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer(template=True)
    tokenizer.chat_template = TEMPLATE
    return save_model(tmp_path_factory.mktemp("model") / "tiny", make_model("llama"), tokenizer)


def _records(count: int = 40) -> list[Record]:
    records: list[Record] = []
    for number in range(count):
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"why does matrix {number} light"}]
        if number % 3 == 0:
            arguments = {"sum": number, "of": None} if number % 2 else {"of": "prime", "sum": number}
            call = {"type": "function", "id": f"c{number}", "function": {"name": "prove", "arguments": arguments}}
            messages += [{"role": "assistant", "content": None, "tool_calls": [call]}]
            messages += [{"role": "tool", "content": "seven ünïcode", "tool_call_id": f"c{number}"}]
        record: Record = {"id": f"r{number}", "messages": messages}
        if number % 5 == 0:
            parameters = {"type": "object", "properties": {"sum": {"type": "integer"}}}
            record["tools"] = [{"type": "function", "function": {"name": "prove", "parameters": parameters}}]
        records.append(record)
    return records


def test_rows_are_the_same_bytes_from_every_file(model: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("json", *sorted({"pyarrow", "pandas", "datasets, Json", "datasets, Arrow"} & WRITERS.keys())):
        source = WRITERS[name](tmp_path / f"{name}.in", _records())
        build(source, out=tmp_path / name, model=str(model), config=CONFIG)
        found[name] = snapshot(tmp_path / name)
    expected = found.pop("json")
    assert found
    for name, files in found.items():
        assert files == expected, name
    rows_NV = open_store(tmp_path / "json").rows_at(np.arange(40))
    assert len({row.tobytes() for row in rows_NV}) == 40, "every chat differs to the model"


def test_a_resume_on_another_day_in_another_time_zone_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    source = WRITERS["json"](tmp_path / "chats.jsonl", _records())
    build(source, out=tmp_path / "whole", model=str(model), config=CONFIG)

    def stop(event: Event) -> None:
        if isinstance(event, RowsCommitted):
            raise Stopped

    with pytest.raises(Stopped):
        build(source, out=tmp_path / "part", model=str(model), config=CONFIG, observer=stop)
    committed = len(journal_records(tmp_path / "part"))
    run_elsewhere(_RESUME, str(tmp_path / "part"), str(model), zone="Pacific/Kiritimati")
    assert len(journal_records(tmp_path / "part")) > committed
    assert snapshot(tmp_path / "part") == snapshot(tmp_path / "whole")


def test_another_date_makes_other_rows_and_is_recorded(model: Path, tmp_path: Path) -> None:
    """The date is in the rows: the test above could fail."""
    source = WRITERS["json"](tmp_path / "chats.jsonl", _records(16))
    rows = []
    for day in ("2024-07-26", "2031-03-05"):
        config = dataclasses.replace(CONFIG, embedding=dataclasses.replace(CONFIG.embedding, chat_date=day))
        build(source, out=tmp_path / day, model=str(model), config=config)
        store = open_store(tmp_path / day)
        assert store.spec.embedding.chat_date == day
        rows.append(store.rows_at(np.arange(16)).astype(np.float64))
    assert (np.linalg.norm(rows[0] - rows[1], axis=1) > 1e-2).all()


def test_a_model_knows_whether_its_template_reads_the_clock(model: Path, tmp_path: Path) -> None:
    assert TorchSource(locate_model(EmbeddingConfig(model=str(model)))).reads_clock()
    plain = save_model(tmp_path / "plain", make_model("llama"), make_tokenizer(template=True))
    assert not TorchSource(locate_model(EmbeddingConfig(model=str(plain)))).reads_clock()
