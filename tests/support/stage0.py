"""Stage 0 of a prompts file, read back from its files without the package's own readers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embstore.core.records import PromptsRecord
from embstore.storage.ingest import ingest


@dataclass(frozen=True, kw_only=True)
class Stage0:
    """What ``ingest`` wrote, as plain values."""

    record: PromptsRecord
    ids: list[str]
    aliases: dict[str, int]
    texts: list[str]
    prompts: list[dict[str, Any]]
    quarantine: list[tuple[int, str]]
    line_rows: list[int]
    multiplicity: list[int]
    keys: list[int]
    files: dict[str, bytes]


def read_stage0(folder: Path, record: PromptsRecord) -> Stage0:
    """Read every file of stage 0, and hold it against its digest."""
    files = {name: (folder / name).read_bytes() for name in record.files}
    for name, content in files.items():
        assert (record.files[name].bytes, record.files[name].sha256) == (len(content), hashlib.sha256(content).hexdigest())
    arrays = {name: np.load(folder / name, allow_pickle=False) for name in files if name.endswith(".npy")}
    assert {name: array.dtype.str for name, array in arrays.items()} == {
        "line_rows.npy": "<i8",
        "multiplicity.npy": "<i4",
        "keys.npy": "<u8",
    }
    quarantine = [json.loads(line) for line in files["quarantine.jsonl"].splitlines()]
    return Stage0(
        record=record,
        ids=json.loads(files["ids.json"]),
        aliases=json.loads(files["aliases.json"]),
        texts=json.loads(files["prompts_list.json"]),
        prompts=[json.loads(line) for line in files["prompts.jsonl"].splitlines()],
        quarantine=[(entry["line"], entry["reason"]) for entry in quarantine],
        line_rows=arrays["line_rows.npy"].tolist(),
        multiplicity=arrays["multiplicity.npy"].tolist(),
        keys=arrays["keys.npy"].tolist(),
        files=files,
    )


def ingested(source: Path | str, folder: Path, *, strict: bool = False, limit: int | None = None) -> Stage0:
    """Ingest ``source`` into ``folder`` and read it back."""
    folder.mkdir(exist_ok=True)
    stage0 = read_stage0(folder, ingest(source, folder, folder, strict=strict, limit=limit))
    assert sorted(path.name for path in folder.iterdir()) == sorted(stage0.files), "scratch files are gone"
    return stage0
