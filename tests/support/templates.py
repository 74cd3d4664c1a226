"""Chat templates, in imitation of those of real families, and what they make of prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tokenizers
import transformers

from embstore.core.config import DEFAULT_CHAT_DATE
from embstore.core.prompts import Prompt
from embstore.model.tokens import PromptTokenizer

# every value that a template can see, in the order in which it sees it
PRINTS_ALL = "{{ messages | tojson }}|{{ tools | tojson }}|{{ enable_thinking is defined }}"

# How families ask for the date (their system turns, shortened).
_HEADS = {
    "Llama 3.1": r"""{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}""",
    "Llama 3.2": r"""{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}""",
    "Granite 3": r"""{%- if messages[0]['role'] != 'system' %}
    {{- "Today's Date: " + strftime_now('%B %d, %Y') + ".\n" }}
{%- endif %}""",
    "gpt-oss": r"""{%- macro build_system_message() -%}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\n\n" }}
{%- endmacro -%}
{{- build_system_message() }}""",
    "Mistral Small 3": r"""{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "The current date is " + today + "." %}
{{- default_system_message }}""",
    "SmolLM3": r"""{# ───── defaults ───── #}
{%- set today = strftime_now("%d %B %Y") -%}
{{- "Today Date: " ~ today ~ "\n" -}}""",
    "Muse": r"""{%- if current_date is defined and current_date -%}
    {{- '\nCurrent date: ' + current_date + '.' -}}
{%- elif strftime_now is defined -%}
    {{- '\nCurrent date: ' + strftime_now('%Y-%m-%d') + '.' -}}
{%- endif -%}""",
    "to the second": "It is {{ strftime_now('%A, %-d %B, %H:%M:%S %p %Z %c') }}.\n",
    "a variable of another name": r"""{% if today_date is defined %}{{ today_date }}
{% else %}{{ strftime_now("%x") }}{% endif %}""",
}
_TURNS = "{% for message in messages %}{{ '<' + message.role + '>' + message.content }}{% endfor %}"
DATED = {name: template + _TURNS for name, template in _HEADS.items()}


@functools.cache
def _backend() -> Any:
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))


def tokenizer_with(template: object) -> Any:
    """A tokenizer whose chat template is ``template``."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_backend(), unk_token="[UNK]")
    tokenizer.chat_template = template
    return tokenizer


def rendered(prompts: Sequence[Prompt], template: object, *, chat_date: str | None = DEFAULT_CHAT_DATE) -> list[str]:
    """What a model with that template reads."""
    tokenizer = PromptTokenizer(tokenizer_with(template), 512, 2, chat_date=chat_date)
    return [tokenizer._apply_template(prompt) for prompt in prompts]
