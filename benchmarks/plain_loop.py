"""Transformers' own backbone in bfloat16 over the batches of a build, means pooled.

``python -m benchmarks.plain_loop FILE MODEL WINDOW_ROWS``. Weights lie mapped, as ``from_pretrained`` leaves them. As many
batches run at a time as embstore runs for a model of this size.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from embstore.core.prompts import Prompt
from embstore.core.rows import slices
from embstore.host.threads import Workers, finish_all, num_cores, workers_for
from embstore.model.batches import TokenBatch, batches_by_length, few_lengths, padded_batch
from embstore.model.tokens import PromptTokenizer

_MAX_TOKENS, _BATCH_TOKENS = 512, 2048


def main() -> None:
    """Print the seconds of the loop as JSON."""
    file, folder, window_rows = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    backbone, width, inner = model.base_model, model.config.hidden_size, model.config.intermediate_size
    tokenizer = PromptTokenizer(
        transformers.AutoTokenizer.from_pretrained(folder), _MAX_TOKENS, model.config.vocab_size, chat_date=None
    )
    texts = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]
    rows = tokenizer.encode([Prompt(id=None, text=text) for text in texts])
    batches = [
        padded_batch(rows[window], *each, pad_id=0)
        for window in slices(0, len(rows), window_rows)
        for each in batches_by_length(rows[window], batch_tokens=_BATCH_TOKENS, padded_length=few_lengths)
    ]
    activation_bytes = _BATCH_TOKENS * (12 * width + 4 * inner) * 4
    workers = Workers(num_cores(), workers_for(num_cores(), activation_bytes))

    def run(batch: TokenBatch) -> None:
        hidden: Tensor = backbone(input_ids=torch.from_numpy(batch.tokens_BT), use_cache=False).last_hidden_state
        pooled = torch.from_numpy(batch.pooled_BT)[..., None]
        (hidden.float() * pooled).sum(dim=1) / pooled.sum(dim=1)

    started = time.perf_counter()
    finish_all([workers.submit(functools.partial(run, batch)) for batch in batches])
    seconds = time.perf_counter() - started
    tokens = sum(batch.tokens_BT.size for batch in batches)
    print(json.dumps({"seconds": round(seconds, 2), "padded_tokens": tokens, "workers": workers.num_workers}))


if __name__ == "__main__":
    main()
