"""How far batch mates move a row: L2 between rows computed alone and in a batch, before rounding, for each dtype.

``python -m benchmarks.batch_invariance --prompts FILE --model FOLDER``; writes ``benchmarks/results/batch_invariance.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.acceptance import RESULTS, cpu_name
from embstore.core.config import EmbeddingConfig
from embstore.core.events import ignore
from embstore.model.locate import locate_model
from embstore.model.source import TorchSource
from embstore.storage.ingest import ingest
from embstore.storage.prompt_table import PromptTable

NUM_PROMPTS = 400
BATCHED, ALONE = 48, 24


def main() -> int:
    """Measure float32 and bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "cpu": cpu_name(),
        "prompts": options.prompts.name,
        "model": options.model.name,
        "rows": ALONE,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        record = ingest(options.prompts, folder, folder, strict=False, limit=NUM_PROMPTS)
        table = PromptTable(folder / "prompts.jsonl", record.rows)
        for dtype in ("float32", "bfloat16"):
            source = TorchSource(locate_model(EmbeddingConfig(model=str(options.model))))
            config = EmbeddingConfig(dtype=dtype)
            embedder = source.create(table, config, memory_bytes=2 << 30, work=folder, observer=ignore)
            rows = embedder._tokenizer.encode(table.sample(range(BATCHED)))
            with torch.inference_mode():
                together = embedder.unit_rows(embedder.pool(rows, lambda: None), 0, ALONE)[0].double()
                alone = [embedder.unit_rows(embedder.pool([row], lambda: None), 0, 1)[0].double() for row in rows[:ALONE]]
                moved = torch.linalg.vector_norm(torch.cat(alone) - together, dim=1)
            results[dtype] = {"max_l2": float(moved.max()), "median_l2": float(moved.median())}
    (RESULTS / "batch_invariance.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
