"""How many tokens a class takes: its configuration's word, and the size of its learned table of positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_NAMES = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len", "max_sequence_length")
# of classes outside transformers; within it T5 has the second name in its files, and no such limit
_NAMES_ELSEWHERE = (*_NAMES, "n_positions", "seq_length", "n_ctx")
_TABLES = ("position_embeddings", "embed_positions", "wpe", "position_embedding", "pos_embeddings", "positions_embed")
_OTHER_SENSES = ("vision", "visual", "image", "audio", "speech", "patch")


def usable_positions(model: Any) -> int | None:  # noqa: ANN401 - transformers is untyped
    """The longest prompt that the model takes, in tokens; None where nothing limits it.

    A learned table may have fewer usable rows than the configuration says: RoBERTa and its kin begin at ``padding_idx + 1``,
    OPT and BART at an ``offset``.
    """
    config = model.config.get_text_config()
    names = _NAMES if type(config).__module__.startswith("transformers.models.") else _NAMES_ELSEWHERE
    named = next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), None)
    limits = [*([named] if named is not None else []), *_table_sizes(model)]
    if getattr(config, "attention_type", None) is not None and hasattr(config, "num_random_blocks"):
        # longer batches would need BigBird's sparse attention, which draws random blocks
        limits.append((5 + 2 * config.num_random_blocks) * config.block_size)
    return min(limits, default=None)


def _table_sizes(model: Any) -> Iterator[int]:  # noqa: ANN401
    for path, module in model.named_modules():
        *outer, name = path.split(".")
        if not isinstance(module, nn.Embedding) or name not in _TABLES:
            continue
        if any(sense in part for part in outer for sense in _OTHER_SENSES):
            continue
        offset = getattr(module, "offset", None)
        if offset is None:
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
        yield module.num_embeddings - int(offset)
