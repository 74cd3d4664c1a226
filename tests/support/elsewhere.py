"""Another day, time zone and language, for code that must not depend on them. ``go`` is for a process of its own."""

from __future__ import annotations

import contextlib
import datetime
import locale
import os
import subprocess
import sys
import time
from pathlib import Path

import transformers.utils.chat_template_utils as transformers_clock


class LastCentury(datetime.datetime):
    """A clock that says the last evening of 1999."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> LastCentury:
        """The same moment whenever it is asked."""
        return cls(1999, 12, 31, 23, 59, 58, tzinfo=tz)


def go() -> None:
    """Have this process believe that it runs then and there; the time zone is that of its environment."""
    transformers_clock.datetime = LastCentury
    time.tzset()
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C.UTF-8"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            break


def run_elsewhere(script: str, *arguments: str, zone: str) -> str:
    """What a Python script prints in a process of its own, elsewhere."""
    ran = subprocess.run(
        [sys.executable, "-c", f"from tests.support import elsewhere\nelsewhere.go()\n{script}", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TZ": zone},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=600,
    )
    return ran.stdout
