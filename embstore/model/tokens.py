"""Prompts to token rows: a pure function of prompts and tokenizer.

Token rule (``TOKEN_RULE``): text goes through the tokenizer's default special tokens, which condition the model but are not
pooled; chats use the chat template without generation prompt (``role: content`` lines when there is none) and their special
tokens are not pooled either; the first max_tokens are kept. The template sees the date that the store records.

Shapes: T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from embstore.core.errors import ModelError
from embstore.core.prompts import Message, Prompt, render_messages
from embstore.core.records import refused_by_template
from embstore.model.chat_clock import ChatClock, reads_clock

TOKEN_RULE = "own-tokens-1"  # names the rule above; another rule needs another name, because rows would differ


_PROBE = "Hello"  # a content that says how a chat template reads contents


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """Tokens of one prompt: ``ids_T`` int64, and ``pooled_T`` bool, true where the token is the prompt's own.

    ``refusal`` says why the chat template gives no text for the prompt; it has no tokens then.
    """

    ids_T: NDArray[np.int64]
    pooled_T: NDArray[np.bool_]
    was_cut: bool
    refusal: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Template:
    """A chat template as a store renders it.

    ``changed`` has the store's clock in it; None: the tokenizer's own is used. ``dates`` are the dates that it takes
    as variables. ``takes_parts``: it prints contents only where they are lists of parts.
    """

    changed: str | None
    dates: Mapping[str, str]
    takes_parts: bool = False


class RefusedChatError(Exception):
    """The chat template gives no text for a chat; the message is the reason that its row states."""


class PromptTokenizer:
    """A Hugging Face tokenizer under the token rule, for a model that knows ``num_tokens`` tokens.

    ``chat_date`` (YYYY-MM-DD) is what the chat template takes for today; None: the store does not record it, and the flow
    refuses a template that asks for the clock.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, num_tokens: int, *, chat_date: str | None) -> None:  # noqa: ANN401
        self._tokenizer = tokenizer
        self._clock = None if chat_date is None else ChatClock(date=datetime.date.fromisoformat(chat_date))
        self._templates: dict[str, _Template] = {}  # by the tokenizer's own
        self.max_tokens = max_tokens
        self._num_tokens = num_tokens
        self._backend = _plain_backend(tokenizer)
        # tokens that are special only to the chat template (turn markers) are flagged in no list of names
        flagged = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = np.array(sorted(flagged | set(tokenizer.all_special_ids)), dtype=np.int64)

    @property
    def pad_id(self) -> int:
        """What fills a batch: masked, so any token of the model's table does where the tokenizer's own is not in it.

        A pad token that was added without resizing the model is beyond the table, and some configurations say -1.
        """
        given = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        return next((pad for pad in given if isinstance(pad, int) and 0 <= pad < self._num_tokens), 0)

    def encode(self, prompts: Sequence[Prompt]) -> list[TokenRow]:
        """Token rows in prompt order; a chat that the template refuses has no tokens.

        Raises
        ------
        ModelError
            The tokenizer is another model's.
        """
        texts = [index for index, prompt in enumerate(prompts) if not self._is_templated(prompt)]
        chats = [index for index, prompt in enumerate(prompts) if self._is_templated(prompt)]
        rows: dict[int, TokenRow] = {}
        for index, (ids, special) in zip(texts, self._tokens_of([_text_of(prompts[index]) for index in texts]), strict=True):
            rows[index] = self._cut(np.asarray(ids, dtype=np.int64), ~np.asarray(special, dtype=np.bool_))
        # the template writes the special tokens itself
        rendered: dict[int, str] = {}
        for index in chats:
            try:
                rendered[index] = self._apply_template(prompts[index])
            except RefusedChatError as error:
                nothing = np.empty(0, dtype=np.int64)
                rows[index] = TokenRow(ids_T=nothing, pooled_T=nothing > 0, was_cut=False, refusal=str(error))
        tokens = self._tokens_of(list(rendered.values()), add_special_tokens=False)
        for index, (ids, _) in zip(rendered, tokens, strict=True):
            ids_T = np.asarray(ids, dtype=np.int64)
            rows[index] = self._cut(ids_T, ~np.isin(ids_T, self._special_ids))
        return [rows[index] for index in range(len(prompts))]

    def refusal(self, prompt: Prompt) -> str | None:
        """Why the chat template gives no text for a prompt, None if it gives one or is not asked."""
        if self._is_templated(prompt):
            try:
                self._apply_template(prompt)
            except RefusedChatError as error:
                return str(error)
        return None

    def _tokens_of(self, texts: list[str], *, add_special_tokens: bool = True) -> list[tuple[list[int], list[int]]]:
        """Token ids of each text, and 1 where the tokenizer itself added the token."""
        if not texts:
            return []
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [(each.ids, each.special_tokens_mask) for each in encodings]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        return list(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True))

    def _is_templated(self, prompt: Prompt) -> bool:
        return prompt.messages is not None and bool(self._tokenizer.chat_template)

    def _apply_template(self, prompt: Prompt) -> str:
        messages = prompt.messages or ()
        calls = [arguments for message in messages for arguments in _arguments(message)]
        try:
            template = self._template_for(prompt)
            try:
                rendered = self._rendered(prompt, messages, template)
            except Exception:  # jinja raises whatever the model's template raises
                if not calls:
                    raise
                rendered = None
            # some templates join the arguments of a call with text, as OpenAI gives them, or print an object as Python does
            if rendered is None or any(repr(arguments) in rendered for arguments in calls):
                rendered = self._rendered(prompt, [_with_text_arguments(each) for each in messages], template)
        except ModelError:
            raise
        except Exception as error:
            raise RefusedChatError(refused_by_template(str(error) or type(error).__name__)) from error
        return rendered

    def _rendered(self, prompt: Prompt, messages: Sequence[Message], template: _Template) -> str:
        given: dict[str, object] = dict(prompt.template_kwargs or {})
        if prompt.tools is not None:
            given["tools"] = list(prompt.tools)
        if template.takes_parts:
            messages = [_with_parts(message) for message in messages]
        return self._printed(messages, template, given)

    def _printed(self, messages: Sequence[Message], template: _Template, given: Mapping[str, object]) -> str:
        given = {**template.dates, **given}
        if template.changed is not None:
            given["chat_template"] = template.changed
        return str(
            self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=False, **given
            )
        )

    def _template_for(self, prompt: Prompt) -> _Template:
        own = self._tokenizer.chat_template
        if not isinstance(own, str):  # several, by name
            own = self._tokenizer.get_chat_template(tools=prompt.tools)
        if self._clock is None and reads_clock(own):
            raise ModelError(
                "the chat template prints the current date, and no date is recorded for the rows of this store",
                hint="build into another --out: new stores record their date",
            )
        if own not in self._templates:
            changed, dates = (own, {}) if self._clock is None else (self._clock.set_in(own), self._clock.variables(own))
            template = _Template(changed=None if changed == own else changed, dates=dates)
            self._templates[own] = dataclasses.replace(template, takes_parts=self._takes_parts(template))
        return self._templates[own]

    def _takes_parts(self, template: _Template) -> bool:
        """Whether the template prints nothing of a text, but its parts, as those of LLaVA and Idefics do."""

        def prints(message: Message) -> bool:
            try:
                return _PROBE in self._printed([message], template, {})
            except Exception:  # noqa: BLE001 - jinja raises whatever the model's template raises
                return False

        message = {"role": "user", "content": _PROBE}
        return not prints(message) and prints(_with_parts(message))

    def _cut(self, ids_T: NDArray[np.int64], pooled_T: NDArray[np.bool_]) -> TokenRow:
        if len(ids_T) and ids_T.max() >= self._num_tokens:
            raise ModelError(
                f"the tokenizer gives token {ids_T.max()}, the model knows {self._num_tokens} tokens",
                hint="is this the model's own tokenizer?",
            )
        keep = slice(0, self.max_tokens)
        return TokenRow(ids_T=ids_T[keep], pooled_T=pooled_T[keep], was_cut=len(ids_T) > self.max_tokens)


def _plain_backend(tokenizer: Any) -> Any:  # noqa: ANN401
    """The Rust tokenizer behind ``tokenizer`` where calling it gives the same tokens, else None.

    It takes two thirds of the time, because it makes neither offsets nor Python copies of unused lists.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None  # slow
    # transformers 4 has both methods, 5 only the second one
    for name in ("_batch_encode_plus", "_encode_plus"):
        if getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name, None):
            return None  # its class overrides the tokenization
    tokenizer("")  # sets truncation, padding and the reading of special tokens as every call without options does
    return tokenizer.backend_tokenizer


def template_reads_clock(tokenizer: Any) -> bool:  # noqa: ANN401
    """Whether the chat template of a tokenizer, or one of several, asks for the current time."""
    given = tokenizer.chat_template or ""
    templates = [given] if isinstance(given, str) else list(given.values())
    return any(reads_clock(template) for template in templates)


def last_token_only(row: TokenRow) -> TokenRow:
    """The same tokens, of which only the last of those pooled is pooled: ``--pooling last``."""
    pooled_T = np.zeros_like(row.pooled_T)
    pooled_T[np.flatnonzero(row.pooled_T)[-1:]] = True
    return dataclasses.replace(row, pooled_T=pooled_T)


def _arguments(message: Message) -> list[dict[str, object]]:
    """The objects that are arguments of a message's tool calls; empty ones look the same in every spelling."""
    calls = message.get("tool_calls")
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    found = [function.get("arguments") for function in functions if isinstance(function, dict)]
    return [arguments for arguments in found if isinstance(arguments, dict) and arguments]


def _with_text_arguments(message: Message) -> Message:
    """The message, with the arguments of its tool calls as JSON text."""
    if not _arguments(message):
        return message
    changed: dict[str, Any] = copy.deepcopy(dict(message))
    for call in changed["tool_calls"]:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), dict):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return changed


def _with_parts(message: Message) -> Message:
    """The message, with its content as a list of parts."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _text_of(prompt: Prompt) -> str:
    return render_messages(prompt.messages) if prompt.messages is not None else prompt.text or ""
