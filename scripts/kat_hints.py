"""Hints of the library in a kat script's own words: its flags, and its command in place of ``embstore build``."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator, Set

from embstore.core.errors import EmbstoreError

COMPUTE = "python -m scripts.kat_compute_embeddings_offline"

_FLAG = r"--[a-z][\w-]*"
_VALUE = r"(?:'[^']*'|\S*[^\s,;:])"
_BUILD = re.compile(
    rf"embstore build(?P<prompts> -(?= )| (?!-){_VALUE}(?= --))?"
    rf"(?P<options>(?: --(?:model|out|reuse) {_VALUE}| --resume\b)*)"
)
_AGAIN = re.compile(r"(?: again)? (?:\(a build: with --resume\)|with --resume\b)")
# flags after another command are its own
_OTHER = rf"(?:embstore|hf) [^,;]*|{re.escape(COMPUTE)}(?: {_FLAG} {_VALUE})*"
_FLAGS = re.compile(rf"(?P<other>{_OTHER})|(?P<flag>{_FLAG})|(?P<prompts>\bPROMPTS\b)")


@contextlib.contextmanager
def own_hints(parser: argparse.ArgumentParser, more: Set[str] = frozenset()) -> Iterator[None]:
    """Spell the hint of an expected error with the flags of ``parser`` and those in ``more``."""
    try:
        yield
    except EmbstoreError as error:
        if error.hint:
            error.hint = spelled(error.hint, more | set(re.findall(_FLAG, parser.format_usage())))
        raise


def spelled(hint: str, flags: Set[str]) -> str:
    """``hint`` for a script with these flags. Flags that the script does not have are named as such at the end.

    Examples
    --------
    >>> spelled("run embstore build --resume --out STORE", {"--output_dir"})
    'run python -m scripts.kat_compute_embeddings_offline --output_dir STORE again'
    >>> spelled("choose another --out, or add --on-error quarantine", {"--output_dir", "--on_error"})
    'choose another --output_dir, or add --on_error quarantine'
    """
    missing: list[str] = []

    def own(match: re.Match[str]) -> str:
        if match["other"]:
            return match[0]
        flag = match["flag"] or "--prompts_path"
        names = [flag, flag.replace("-", "_").replace("__", "--", 1), {"--out": "--output_dir"}.get(flag, flag)]
        name = next((name for name in names if name in flags), None)
        if name is None:
            missing.append(flag)
        return name or match[0]

    hint = _AGAIN.sub(" again", _BUILD.sub(_own_build, hint)).replace("add --resume", "run the command again")
    hint = _FLAGS.sub(own, hint)
    if missing:
        hint += f" ({', '.join(dict.fromkeys(missing))}: of embstore build, not of this script)"
    return hint


def _own_build(match: re.Match[str]) -> str:
    prompts = f" --prompts_path{match['prompts']}" if match["prompts"] else ""
    options = match["options"].replace(" --out ", " --output_dir ")
    again = " again" if "--resume" in options and not prompts else ""
    return f"{COMPUTE}{prompts}{options.replace(' --resume', '')}{again}"
