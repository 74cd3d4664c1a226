"""A minimal training loop with density weights: map them, sample prompts, take steps.

Usage: ``python -m scripts.demo_train STORE MODEL``.
"""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from embstore import open_store
from embstore.core.rows import RowRange
from embstore.training import DensitySampler, load_weights


def main(store_path: str, model_path: str, num_steps: int = 30) -> None:
    """Fine-tune for a few steps on prompts drawn in proportion to their weights."""
    store = open_store(store_path)
    texts = [prompt.rendered for prompt in store.prompts.read(RowRange(0, store.num_rows))]
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    weights = load_weights(store_path).for_dataset(texts)  # memory-mapped, validated, joined by content
    sampler = DensitySampler(weights, num_samples=8 * num_steps, seed=0)
    loader: DataLoader[str] = DataLoader(texts, batch_size=8, sampler=sampler)  # type: ignore[arg-type]  # a list is enough
    for step, batch in enumerate(loader, start=1):
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt")
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        loss = model(**tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"  step {step:3d}  loss {loss.item():.3f}  drew e.g. {' '.join(batch[0].split())[:60]!r}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
