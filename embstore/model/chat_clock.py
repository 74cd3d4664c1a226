"""The clock that chat templates see: one recorded date, so that a row does not depend on the day it is computed.

transformers gives every template ``strftime_now``, which reads the wall clock, in the process's time zone and language. The
template is given a macro of that name instead, in Jinja itself: newer versions of transformers replace functions among a
template's variables, and their compiled templates are shared with whoever else uses the tokenizer. Dates that a template
takes as variables are given as variables. docs/decisions/0049
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

_CLOCK = "strftime_now"
# Names by which templates take a date, and how they print it where nobody gives one.
_VARIABLES = {
    "date_string": "%d %b %Y",  # Llama 3.1 to 3.3; its own default is 26 Jul 2024
    "current_date": "%Y-%m-%d",
    "today_date": "%Y-%m-%d",
    "todays_date": "%Y-%m-%d",
    "today": "%Y-%m-%d",
    "date": "%Y-%m-%d",
    "current_datetime": "%Y-%m-%d %H:%M:%S",
    "datetime": "%Y-%m-%d %H:%M:%S",
}
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_HALVES = (
    ("January", "February", "March", "April", "May", "June"),
    ("July", "August", "September", "October", "November", "December"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatClock:
    """What templates are given of ``date`` (midnight, UTC, English names), each of them only what it reads."""

    date: datetime.date

    def variables(self, template: str) -> dict[str, str]:
        """Dates that the template takes as variables."""
        words = _words(template)
        return {name: self.strftime(form) for name, form in _VARIABLES.items() if name in words}

    def set_in(self, template: str) -> str:
        """The template with a clock that stands still; unchanged where it asks for none."""
        if not reads_clock(template):
            return template
        # %% first becomes something that no code contains, so that %%Y stays %Y
        replaced = "|replace('%%', '\\0')"
        for code, value in _codes(self.date).items():
            replaced += f"|replace('{code}', '{value.encode('unicode_escape').decode()}')"
        macro = f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced}|replace('\\0', '%') }}}}{{% endmacro %}}"
        return f"{macro}\n{template}"  # the line break belongs to the macro: transformers trims it

    def strftime(self, form: str) -> str:
        """The date in the form of C's strftime, in the C locale.

        Examples
        --------
        >>> ChatClock(date=datetime.date(2024, 7, 6)).strftime("%A, %-d %b %Y, %H:%M, 100 %%")
        'Saturday, 6 Jul 2024, 00:00, 100 %'
        """
        codes = _codes(self.date)
        return re.sub(r"%-?.", lambda found: "%" if found[0] == "%%" else codes.get(found[0], found[0]), form)


def reads_clock(template: str) -> bool:
    """Whether a template asks for the current time."""
    return _CLOCK in _words(template)


def _words(template: str) -> set[str]:
    return set(re.findall(r"\w+", template))


def _codes(date: datetime.date) -> dict[str, str]:
    """Each code of strftime, with its value at midnight UTC."""
    day, month = _DAYS[date.weekday()], _HALVES[(date.month - 1) // 6][(date.month - 1) % 6]
    year, week, weekday = date.isocalendar()
    start = date.timetuple().tm_yday + 6
    numbers = {
        "d": (date.day, 2),
        "m": (date.month, 2),
        "y": (date.year % 100, 2),
        "j": (date.timetuple().tm_yday, 3),
        "H": (0, 2),
        "I": (12, 2),
        "M": (0, 2),
        "S": (0, 2),
        "U": ((start - (date.weekday() + 1) % 7) // 7, 2),
        "W": ((start - date.weekday()) // 7, 2),
        "V": (week, 2),
        "g": (year % 100, 2),
    }
    codes = {f"%{name}": f"{value:0{width}d}" for name, (value, width) in numbers.items()}
    codes |= {f"%-{name}": str(value) for name, (value, _) in numbers.items()}
    epoch = datetime.datetime(date.year, date.month, date.day, tzinfo=datetime.UTC)
    return codes | {
        "%Y": f"{date.year:04d}",
        "%C": f"{date.year // 100:02d}",
        "%G": f"{year:04d}",
        "%u": str(weekday),
        "%w": str(weekday % 7),
        "%e": f"{date.day:2d}",
        "%k": " 0",
        "%l": "12",
        "%f": "000000",
        "%p": "AM",
        "%P": "am",
        "%A": day,
        "%a": day[:3],
        "%B": month,
        "%b": month[:3],
        "%h": month[:3],
        "%F": date.isoformat(),
        "%D": f"{date.month:02d}/{date.day:02d}/{date.year % 100:02d}",
        "%x": f"{date.month:02d}/{date.day:02d}/{date.year % 100:02d}",
        "%T": "00:00:00",
        "%X": "00:00:00",
        "%R": "00:00",
        "%r": "12:00:00 AM",
        "%c": f"{day[:3]} {month[:3]} {date.day:2d} 00:00:00 {date.year:04d}",
        "%s": str(int(epoch.timestamp())),
        "%z": "",  # of a time without a zone, as transformers gives it
        "%Z": "",
        "%n": "\n",
        "%t": "\t",
    }
