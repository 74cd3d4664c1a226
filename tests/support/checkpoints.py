"""Checkpoints as nanochat writes them, with a tokenizer small enough to be computed by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

SPECIALS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
State = dict[str, torch.Tensor]


class PickledEncoding:
    """What of a tiktoken Encoding is read: bytes are tokens 0 to 255, two pairs are merged, then special tokens."""

    def __init__(self) -> None:
        tokens = [bytes([value]) for value in range(256)] + [b"th", b"the"]
        self._mergeable_ranks = {token: rank for rank, token in enumerate(tokens)}
        self._special_tokens = {name: len(tokens) + index for index, name in enumerate(SPECIALS)}
        self._pat_str = r"\s+|\S+"


def tokens_of(text: str) -> list[int]:
    """Bytes, with the two merges, after <|bos|>: word by word, as the pattern splits."""
    ids, data = [], text.encode()
    while data:
        token = next(token for token in (b"the", b"th", data[:1]) if data.startswith(token))
        ids.append({b"th": 256, b"the": 257}.get(token) if len(token) > 1 else token[0])
        data = data[len(token) :]
    return [258, *ids]  # type: ignore[list-item]


def make_base(
    base: Path,
    config: dict[str, Any],
    state: dict[str, Any],
    *,
    source: str = "base_checkpoints",
    tag: str = "d2",
    step: int = 100,
) -> Path:
    """A folder for NANOCHAT_BASE_DIR; the checkpoint's own folder is returned."""
    folder = base / source / tag
    folder.mkdir(parents=True)
    torch.save(state, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": config}))
    (base / "tokenizer").mkdir(exist_ok=True)
    with (base / "tokenizer" / "tokenizer.pkl").open("wb") as file:
        pickle.dump(PickledEncoding(), file)
    return folder


class Evil:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))
