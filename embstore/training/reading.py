"""Which prompt an item of a dataset has: the function of a build, with the store's rule and field names.

Plain texts take a faster way to the same keys (``text_keys``).

Shapes: B items of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embstore.core.config import FIRST_RULE, USUAL_FIELDS, PromptFields, PromptRule
from embstore.core.errors import ConfigError
from embstore.core.prompts import TEMPLATE_FIELDS, Prompt, Rejected, content_fields, prompt_of
from embstore.core.row_keys import key_of
from embstore.core.values import Unreadable, as_json
from embstore.training.items import Block
from embstore.training.text_keys import text_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptReading:
    """How items become prompts: the store's ``rule`` and ``fields``, or the ``column`` that the user named."""

    rule: PromptRule
    fields: PromptFields = USUAL_FIELDS
    column: str | None = None

    def choose(self, present: Sequence[str]) -> list[str]:
        """The columns of a table that are read.

        Raises
        ------
        ConfigError
            None of them contains prompts.
        """
        wanted = content_fields(self._names(present)) if self.column is None else [self.column]
        found = [name for name in wanted if name in present]
        if not found:
            raise ConfigError(
                f"the dataset has no column {' or '.join(wanted)}; it has {', '.join(present) or 'no columns'}",
                hint="name the column with the prompts: key_column",
            )
        return found + [name for name in TEMPLATE_FIELDS if name in present and name not in found]

    def read(self, block: Block) -> BlockPrompts:
        """The prompts of a block."""
        return BlockPrompts(self, block)

    def prompt(self, item: object, position: int) -> Prompt | Rejected:
        """The prompt of one item: a record, a text, or a list of messages."""
        if isinstance(item, Rejected):
            return item
        record = record_of(item, position)
        if is_bare(item):  # it has no columns
            names, read = USUAL_FIELDS, ["prompt"]
        elif self.column is None:
            names = self._names(record)
            read = content_fields(names)
        elif self.column in record:
            names, read = self._names(record), [self.column]
        else:
            raise no_column(self.column, record, position)
        kept = {name: record[name] for name in (*read, *TEMPLATE_FIELDS) if name in record}
        if not kept:
            return prompt_of(record, names, self.rule)  # names the fields that there are
        if self.rule.version == FIRST_RULE.version:
            kept = {name: as_json(value, drops_nulls=False) for name, value in kept.items()}
        return prompt_of(kept, names, self.rule)

    def respelled(self, prompt: Prompt) -> Prompt | None:
        """A prompt without a row as the build may have read it: without null fields (rule 1), or with its JSON decoded."""
        return without_nulls(prompt) if self.rule.version == FIRST_RULE.version else prompt.undecoded()

    def texts(self, block: Block) -> Sequence[object]:
        """The prompts that certainly are the texts of the first field read; something else for other items."""
        if block.columns is None:
            first = self._text_field(self.fields.names)
            return [item if type(item) is str else item.get(first) if type(item) is dict else None for item in block.items]
        first = self._text_field(block.columns)
        return block.columns.get(first or "") or [None] * len(block.positions_B)

    def _text_field(self, present: Iterable[str]) -> str | None:
        """The field that comes before all others, if a text there is a prompt rather than a user's turn."""
        names = self._names(present)
        first = content_fields(names)[0] if self.column is None else self.column
        return first if first in ("prompt", names.text, names.messages) else None

    def _names(self, present: Iterable[str]) -> PromptFields:
        """The store's names where the dataset has them, otherwise the usual ones; any other column is the text's."""
        own = [name for name in (self.fields.text, self.fields.messages) if name is not None]
        if self.column is None:
            return self.fields if any(name in present for name in own) else USUAL_FIELDS
        if self.column in own:
            return self.fields
        return USUAL_FIELDS if self.column in content_fields(USUAL_FIELDS) else PromptFields(text=self.column)


class BlockPrompts:
    """The prompts of some items. ``keys_B`` uint64 [B] are their row keys, 0 for the items in ``rejected``."""

    def __init__(self, reading: PromptReading, block: Block) -> None:
        self._reading, self._block = reading, block
        self._prompts: dict[int, Prompt | Rejected] = {}
        self.keys_B, others = text_keys(reading.texts(block))
        self.has_answers = False
        for index in others:
            prompt = self._prompts[index] = self.prompt(index)
            self.keys_B[index] = 0 if isinstance(prompt, Rejected) else key_of(prompt)
            self.has_answers |= isinstance(prompt, Prompt) and prompt.is_answered
        self.rejected = {index: prompt.reason for index, prompt in self._prompts.items() if isinstance(prompt, Rejected)}

    def prompt(self, index: int) -> Prompt | Rejected:
        """The prompt of one item of the block."""
        if index in self._prompts:
            return self._prompts[index]
        columns = self._block.columns
        item = self._block.items[index] if columns is None else {name: columns[name][index] for name in columns}
        return self._reading.prompt(item, int(self._block.positions_B[index]))


def without_nulls(prompt: Prompt) -> Prompt | None:
    """A chat by rule 1 as a build read it from a table, which has every field in every message: without null fields."""
    if prompt.messages is None:
        return None
    return Prompt(id=None, messages=tuple(as_json(message, drops_nulls=True) for message in prompt.messages))


def other_form(prompt: Prompt) -> Prompt | None:
    """A chat of one user turn as that turn's text, a text as such a chat; None for any other chat.

    An assistant's answer to the turn does not count: the store of texts has the question alone.
    """
    if prompt.messages is None:
        return Prompt(id=None, messages=({"role": "user", "content": prompt.text},))
    roles = [message["role"] for message in prompt.messages]
    if roles not in (["user"], ["user", "assistant"]) or prompt.tools or prompt.template_kwargs:
        return None
    return Prompt(id=None, text=str(prompt.messages[0]["content"]))


def record_of(item: Any, position: int) -> Mapping[str, object]:  # noqa: ANN401 - an item of any dataset
    """An item as a record; a text or a list of messages is its ``prompt``.

    Raises
    ------
    ConfigError
        It has another type.
    """
    if isinstance(item, Mapping):
        return item
    if hasattr(item, "_asdict"):  # a named tuple, such as pandas' itertuples gives
        return dict(item._asdict())
    if hasattr(item, "keys") and hasattr(item, "__getitem__"):  # a row of pandas or sqlite
        return {name: item[name] for name in item.keys()}  # noqa: SIM118 - not a mapping
    if is_bare(item):
        return {"prompt": item}
    raise ConfigError(
        f"item {position} is of type {type(item).__name__}, expected a record, a text or a list of messages",
        hint="pass a Hugging Face dataset, a data frame, a list of records, or the prompts themselves",
    )


def is_bare(item: Any) -> bool:  # noqa: ANN401 - an item of any dataset
    """Whether an item is a text or a list of messages itself, not a record with one."""
    is_list = isinstance(item, Sequence | Unreadable) or hasattr(item, "tolist")
    return is_list and not isinstance(item, Mapping) and not hasattr(item, "keys") and not hasattr(item, "_asdict")


def no_column(name: str, item: object, position: int) -> ConfigError:
    """The error for an item that lacks a named column."""
    present = ", ".join(map(str, item)) if isinstance(item, Mapping) else f"no columns ({type(item).__name__})"
    return ConfigError(f"item {position} has no column {name!r}; it has {present}", hint="name the column that contains it")
