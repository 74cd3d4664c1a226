"""The picture of a terminal in the README, from a recording of a real command.

``script -qec "embstore build ..." RECORDING``, then
``python -m scripts.terminal_picture RECORDING --command "embstore build ..." [--replace OLD=NEW] [--width N]``.

The recording is played to its end as a terminal would, and what is left on the screen is drawn.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "docs" / "terminal.svg"

_CONTROL = re.compile(r"\x1b\[(\d*)A|\x1b\[2K|\r|\n|\x1b\[\?25[hl]")
_THEME = TerminalTheme(
    (22, 27, 34),
    (222, 227, 232),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34),
     (88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)],
    [(110, 118, 129), (255, 161, 152), (86, 211, 100), (227, 179, 65),
     (121, 192, 255), (210, 168, 255), (86, 212, 221), (255, 255, 255)],
)  # fmt: skip


def screen(recording: str) -> list[str]:
    r"""Lines that a terminal shows at the end, with their colours; obeys line breaks, returns, cursor up and erased lines.

    Examples
    --------
    >>> screen("50 %\n\r\x1b[1A\x1b[2K100 %\ndone")
    ['100 %', 'done']
    """
    lines, row, position = [""], 0, 0
    for found in _CONTROL.finditer(recording + "\n"):
        text, position = recording[position : found.start()], found.end()
        lines[row] += text
        if found[0] == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif found[0].endswith("A"):
            row = max(0, row - int(found[1] or 1))
        elif found[0].endswith("2K") or (found[0] == "\r" and recording[position : position + 1] not in ("\n", "")):
            lines[row] = ""
    return lines if lines[-1] else lines[:-1]


def draw(lines: list[str], command: str, width: int) -> str:
    """The screen as SVG that loads nothing: the fonts are the reader's own."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {command}", style="bold cyan"))
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, overflow="ellipsis", highlight=False)
    picture = console.export_svg(title="embstore", theme=_THEME, unique_id="embstore")
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    return re.sub(r"[ \t]+\n", "\n", picture.replace("Fira Code", "ui-monospace"))


def main() -> None:
    """Read the recording and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("--command", required=True, help="the command as the picture shows it")
    parser.add_argument("--replace", action="append", default=[], help="OLD=NEW, such as a path of this machine")
    parser.add_argument("--width", type=int, default=110)
    options = parser.parse_args()
    recording = options.recording.read_bytes().decode()
    recording = re.sub(r"\AScript started.*\n|\n*Script done.*\n*\Z", "", recording)
    for pair in options.replace:
        old, _, new = pair.partition("=")
        recording = recording.replace(old, new)
    PICTURE.write_text(draw(screen(recording), options.command, options.width), encoding="utf-8")


if __name__ == "__main__":
    main()
