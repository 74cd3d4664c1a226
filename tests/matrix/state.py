"""What a class leaves in its modules when it has run: two batches in two threads would meet there."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.matrix.tiny import tiny_config

_SHAPES = ((3, 20), (5, 70), (2, 9))  # rows and tokens: the middle one is longer than any window


@torch.inference_mode()
def changed_state(model_type: str) -> set[str]:
    """Names of attributes and buffers of modules that differ after batches of other shapes."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    changed, kept = set(), []
    before = _attributes(model)
    for shape in _SHAPES:
        kept.append(model(input_ids=torch.randint(3, 250, shape), use_cache=False))  # kept: an id must not be used again
        after = _attributes(model)
        kept.append(after)
        changed |= {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)}
        before = after
    return changed


def _attributes(model: Any) -> dict[str, object]:
    """The value of each attribute and buffer of every module; numbers and strings are the same while they are equal."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")} | module._buffers
        for name, value in own.items():
            found[f"{path}.{name}"] = value if isinstance(value, torch.Tensor) else _interned(value)
    return found


_SEEN: dict[str, object] = {}


def _interned(value: object) -> object:
    return _SEEN.setdefault(repr(value), value) if isinstance(value, int | float | str | bool | tuple) else value
