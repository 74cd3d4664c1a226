"""Rewards of ``kat_train_grpo --reward``: two built in, your own as ``module:function``, or a reward model's folder.

TRL calls a reward with lists ``prompts`` and ``completions`` and one list for each other column of the data; it returns one
number per completion.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embstore.core.errors import ConfigError

Reward = Callable[..., list[float]]

EXACT_ANSWER, FORMAT = "exact-answer", "format"
FORMAT_IN_WORDS = "the share of a completion's words that consist of letters"

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?")  # a minus after a digit is a subtraction
_ANSWER_MARK = "####"
_PUNCTUATION = ".,;:!?()[]\"'"


def find_reward(name: str, columns: Sequence[str]) -> Reward | str:
    """The reward called ``name``: a function, or the folder of a sequence classification model, which TRL loads itself.

    Raises
    ------
    ConfigError
        There is no such reward, or the data lack a column that it reads.
    """
    if name == FORMAT:
        return format_reward
    if name == EXACT_ANSWER:
        if "answer" not in columns:
            raise ConfigError(
                f"the reward {EXACT_ANSWER} reads the column answer, but the data have {', '.join(sorted(columns))}",
                hint='give lines such as {"prompt": "...", "answer": "... #### 42"}',
            )
        return exact_answer_reward
    if (Path(name) / "config.json").is_file():
        return name
    module, _, function = name.partition(":")
    if not function:
        raise ConfigError(
            f"there is no reward {name!r}, and this is not the folder of a reward model",
            hint=f"give --reward {EXACT_ANSWER}, {FORMAT}, module:function, or a folder with config.json",
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the reward {name} cannot be imported: {error}", hint="put the module on PYTHONPATH") from error
    if not callable(found):
        raise ConfigError(f"the reward {name} is not a function but {type(found).__name__}")
    reward: Reward = found
    return reward


def exact_answer_reward(completions: Sequence[Any], answer: Sequence[str], **_: object) -> list[float]:
    """1 if the last numbers of completion and answer are equal, else 0; an answer starts after ``####``, as in GSM8K.

    A completion must end with an answer that has no number; case is ignored.
    """
    return [float(_is_right(text_of(each), given)) for each, given in zip(completions, answer, strict=True)]


def format_reward(completions: Sequence[Any], **_: object) -> list[float]:
    """The share of a completion's words that consist of letters, without punctuation: can be learned in a few steps."""
    return [_share_of_words(text_of(each)) for each in completions]


def text_of(completion: Any) -> str:  # noqa: ANN401 - TRL passes text, or the messages of a chat
    """The text of a completion in either form."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


def _share_of_words(text: str) -> float:
    words = text.split()
    return sum(word.strip(_PUNCTUATION).isalpha() for word in words) / max(1, len(words))


def _is_right(text: str, answer: str) -> bool:
    wanted = answer.rpartition(_ANSWER_MARK)[2].strip()
    number = _last_number(wanted)
    if number is not None:
        return _last_number(text) == number
    return bool(wanted) and text.strip().rstrip(_PUNCTUATION).casefold().endswith(wanted.rstrip(_PUNCTUATION).casefold())


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
