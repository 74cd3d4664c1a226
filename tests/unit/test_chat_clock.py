"""The date in a chat is the one that the store records: on every day, in every time zone and language."""

from __future__ import annotations

import datetime
import json
import re
import string
from typing import Any

import pytest

from embstore.core.config import DEFAULT_CHAT_DATE, EmbeddingConfig
from embstore.core.errors import ConfigError, ModelError
from embstore.core.prompts import Prompt
from embstore.model.chat_clock import ChatClock, reads_clock
from embstore.model.tokens import PromptTokenizer, template_reads_clock
from tests.support.elsewhere import LastCentury, run_elsewhere
from tests.support.templates import DATED, rendered, tokenizer_with

CHAT = Prompt(id="a", messages=({"role": "user", "content": "Hi"},))
# what each template says on 5 March 2031, a Wednesday
EXPECTED = {
    "Llama 3.1": "Today Date: 05 Mar 2031\n\n",
    "Llama 3.2": "Today Date: 05 Mar 2031\n\n",
    "Granite 3": "Today's Date: March 05, 2031.\n",
    "gpt-oss": "Current date: 2031-03-05\n\n",
    "Mistral Small 3": "The current date is 2031-03-05.",
    "SmolLM3": "Today Date: 05 March 2031\n",
    "Muse": "\nCurrent date: 2031-03-05.",
    "to the second": "It is Wednesday, 5 March, 00:00:00 AM  Wed Mar  5 00:00:00 2031.\n",
    "a variable of another name": "2031-03-05\n",
}
_RENDER = """
import json
from tests.support.templates import DATED, rendered
from tests.unit.test_chat_clock import CHAT

print(json.dumps({name: rendered([CHAT], template)[0] for name, template in DATED.items()}))
"""


@pytest.mark.parametrize("name", DATED)
def test_every_family_prints_the_date_that_is_given(name: str) -> None:
    found = rendered([CHAT], DATED[name], chat_date="2031-03-05")
    assert found == [EXPECTED[name] + "<user>Hi"]


def test_another_day_time_zone_and_language_give_the_same_text() -> None:
    here = {name: rendered([CHAT], template)[0] for name, template in DATED.items()}
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        printed = run_elsewhere(_RENDER, zone=zone)
        assert json.loads(printed.splitlines()[-1]) == here
    assert "26 Jul 2024" in here["Llama 3.2"]


def test_the_clock_of_the_process_is_what_templates_would_print(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: without a recorded date, transformers reads the clock that is replaced there."""
    import transformers.utils.chat_template_utils as transformers_clock

    monkeypatch.setattr(transformers_clock, "datetime", LastCentury)
    tokenizer = tokenizer_with(DATED["Llama 3.2"])
    assert "31 Dec 1999" in tokenizer.apply_chat_template([dict(message) for message in CHAT.messages or ()], tokenize=False)
    assert "26 Jul 2024" in rendered([CHAT], DATED["Llama 3.2"])[0]
    # and the tokenizer is as it was for whoever else uses it
    assert "31 Dec 1999" in tokenizer.apply_chat_template([dict(message) for message in CHAT.messages or ()], tokenize=False)


@pytest.mark.parametrize(
    "day", [datetime.date(2024, 7, 26), datetime.date(2020, 12, 31), datetime.date(2021, 1, 3), datetime.date(2007, 1, 1)]
)
@pytest.mark.parametrize("flag", ["", "-"])
def test_codes_are_those_of_c(flag: str, day: datetime.date) -> None:
    """Both in Python and in the template; %s is left out, because it is the one code that a time zone decides."""
    clock, midnight = ChatClock(date=day), datetime.datetime(day.year, day.month, day.day)
    names = "".join(sorted(set(string.ascii_letters) & set("aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZf")))
    plain = "dmyjHIMSUWVg"
    form = " ".join(f"%{flag}{name}" for name in (names if not flag else plain)) + " %% %%Y 100%"
    assert clock.strftime(form) == midnight.strftime(form)
    template = f"{{{{ strftime_now({form!r}) }}}}"
    assert rendered([CHAT], template, chat_date=day.isoformat()) == [midnight.strftime(form)]


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%Y') }}\n",
        "\n  {{ strftime_now('%Y') }}  \n\n",
        "  {% if true %}\n  x{% endif %}\n{{ strftime_now('%Y') }}",
        "   {%- set a = strftime_now('%Y') -%}   b {{ a }}",
        "{# strftime_now #}\n  {# c #}\n  text",
        "text first\n{% macro strftime_now(form) %}own{% endmacro %}{{ strftime_now('%Y') }}",
        "{% for m in [1] %}\n{% if strftime_now is defined %}\n yes {{ strftime_now('%Y') }}\n{% endif %}\n{% endfor %}",
    ],
)
def test_nothing_else_of_a_template_changes(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.chat_template_utils as transformers_clock

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls(2024, 7, 26)

    monkeypatch.setattr(transformers_clock, "datetime", Then)
    expected = tokenizer_with(template).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered([CHAT], template) == [expected]


def test_a_template_that_asks_for_no_date_is_not_touched() -> None:
    clock = ChatClock(date=datetime.date(2024, 7, 26))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert clock.set_in(template) is template
    assert clock.variables(template) == {}
    assert not reads_clock(template)
    assert rendered([CHAT], template, chat_date=None) == ["Hi"]


def test_the_date_of_a_line_is_its_own() -> None:
    dated = Prompt(id="a", messages=CHAT.messages, template_kwargs={"date_string": "Easter"})
    assert rendered([dated, CHAT], DATED["Llama 3.2"]) == [
        "Today Date: Easter\n\n<user>Hi",
        "Today Date: 26 Jul 2024\n\n<user>Hi",
    ]


def test_one_of_several_templates_is_chosen_and_dated() -> None:
    named = {"default": "plain {{ strftime_now('%Y') }}", "tool_use": "tools {{ strftime_now('%m') }}"}
    with_tools = Prompt(id="a", messages=CHAT.messages, tools=({"type": "function", "function": {"name": "f"}},))
    assert rendered([CHAT, with_tools], named) == ["plain 2024", "tools 07"]
    assert template_reads_clock(tokenizer_with(named))
    assert not template_reads_clock(tokenizer_with({"default": "a", "tool_use": "b"}))
    assert not template_reads_clock(tokenizer_with(None))


def test_several_templates_without_a_default_refuse_chats_in_their_own_words() -> None:
    tokenizer = PromptTokenizer(tokenizer_with({"a": "first", "b": "second"}), 16, 1000, chat_date="2024-07-26")
    assert "default" in str(tokenizer.refusal(CHAT))


def test_a_date_that_is_not_recorded_is_never_read_from_the_clock() -> None:
    with pytest.raises(ModelError, match="prints the current date"):
        rendered([CHAT], DATED["gpt-oss"], chat_date=None)
    # its own constant is what it printed before
    assert rendered([CHAT], DATED["Llama 3.1"], chat_date=None) == ["Today Date: 26 Jul 2024\n\n<user>Hi"]
    assert rendered([CHAT], DATED["Llama 3.1"]) == rendered([CHAT], DATED["Llama 3.1"], chat_date=None)


@pytest.mark.parametrize("given", ["today", "2024-7-26", "20240726", "2024-W30-5", "26.07.2024", "2024-02-30", ""])
def test_a_date_that_is_not_a_day_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(given))) as caught:
        EmbeddingConfig(chat_date=given)
    assert DEFAULT_CHAT_DATE in str(caught.value.hint)
