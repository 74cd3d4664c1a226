"""Text as records: lines, and the elements of a JSON array or of objects that are spread over several lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from embstore.core.errors import PromptError
from embstore.core.prompts import Rejected

# A longer line means that the file is not JSONL; reading stays bounded in memory.
MAX_LINE_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_CLOSING, _NUMBER = '}]"', "0123456789.eE+-"
_SPACE = re.compile(r"[ \t\r\n]*")
# an object whose first line does not even end its first value
_SPREAD = re.compile(rb'\{\s*(?:"(?:[^"\\]|\\.)*"\s*:\s*[\[{]?)?\s*')


def is_elements(head: bytes) -> bool:
    r"""Whether text that begins with ``head`` is a JSON array, or objects over several lines, rather than one value a line.

    Examples
    --------
    >>> is_elements(b'[{"prompt": "a"},\n{"prompt": "b"}]'), is_elements(b'{\n  "prompt": "a"\n}')
    (True, True)
    >>> is_elements(b'{"prompt": "a"}\n'), is_elements(b'["a"]\n["b"]\n')
    (False, False)
    """
    text = head.removeprefix(_BOM).lstrip()
    first, _, rest = text.partition(b"\n")
    second, ended, _ = rest.lstrip().partition(b"\n")
    is_array = first.startswith(b"[")
    if _loaded(first) is not None:
        return is_array and not second
    if _begins_over_lines(text, is_array=is_array) or first.strip() == b"[":
        return True
    lines_follow = bool(ended) and isinstance(_loaded(second), dict)  # then the first line is one bad line
    return not lines_follow and (is_array or (_SPREAD.fullmatch(first) is not None and bool(second)))


def _loaded(line: bytes) -> object:
    """The value of a line, None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _begins_over_lines(head: bytes, *, is_array: bool) -> bool:
    """Whether ``head`` has the whole of an object that ends on a later line, or of an array's first element."""
    text = head.decode("utf-8", "surrogateescape")
    if not text.startswith(("{", "[")):
        return False
    try:
        end = json.JSONDecoder().raw_decode(text, _space_end(text, 1) if is_array else 0)[1]
    except (ValueError, RecursionError):
        return False
    if not is_array:
        return "\n" in text[:end]
    after = _space_end(text, end)
    return text.startswith(",", after) or (text.startswith("]", after) and "\n" in text[:after])


def _space_end(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()  # type: ignore[union-attr]  # it always matches


def lines(stream: BinaryIO) -> Iterator[bytes | Rejected]:
    """Lines of a stream without a byte order mark; one that is longer than ``MAX_LINE_BYTES`` is not held and rejected."""
    first = True
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES)
            yield Rejected(reason=f"longer than {MAX_LINE_BYTES >> 20} MiB")
        else:
            yield line.removeprefix(_BOM) if first else line
        first = False


def elements(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Elements of a JSON array, or JSON values that follow each other, each as its own bytes. Memory is that of one element.

    Where one ends is found by Python's decoder; what it says is decided by whoever reads the bytes. Bytes that are not UTF-8
    come back as they were.

    Raises
    ------
    PromptError
        The text is not JSON, which leaves no way to find the next element, or an element has more than ``MAX_LINE_BYTES``.
    """
    text = _Text(stream, name)
    is_array = text.accept("[")
    number = 0
    if is_array and text.accept("]"):
        text.refuse_more()
        return
    while is_array or not text.is_at_end():
        number += 1
        yield text.value(number).encode("utf-8", "surrogateescape")
        if is_array and not text.accept(","):
            if not text.accept("]"):
                raise text.refusal(f"element {number} is followed by neither a comma nor the end of the array")
            text.refuse_more()
            return


class _Text:
    """Text of a stream, read ahead as far as the next value needs."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    def refusal(self, reason: str) -> PromptError:
        return PromptError(
            f"{self._name} is not valid JSON: {reason}",
            hint="correct it; lines of JSON are read one by one, and only bad lines are left out",
        )

    def is_at_end(self) -> bool:
        """Whether only white space is left."""
        while True:
            self._at = _space_end(self._text, self._at)
            if self._at < len(self._text) or self._ended:
                return self._at == len(self._text)
            self._more()

    def accept(self, mark: str) -> bool:
        """Step over ``mark`` if it comes next."""
        found = not self.is_at_end() and self._text[self._at] == mark
        self._at += found
        return found

    def refuse_more(self) -> None:
        if not self.is_at_end():
            raise self.refusal("the array is followed by more text")

    def value(self, number: int) -> str:
        """The text of the next value."""
        if self.is_at_end():
            raise self.refusal(f"it ends before element {number}")
        while True:
            try:
                end = self._json.raw_decode(self._text, self._at)[1]
            except RecursionError:
                raise self.refusal(f"element {number} is nested too deep") from None
            except ValueError as error:
                problem = error
            else:
                # a number may go on behind what was read so far; "1e" is read as 1
                is_whole = self._text[end - 1] in _CLOSING or (end < len(self._text) and self._text[end] not in _NUMBER)
                if is_whole or self._ended:
                    value, self._at = self._text[self._at : end], end
                    return value
                problem = ValueError("the number goes on")
            if self._ended:
                raise self.refusal(f"element {number}: {str(problem)[:80]}") from problem
            if len(self._text) - self._at > MAX_LINE_BYTES:
                raise self.refusal(f"element {number} is longer than {MAX_LINE_BYTES >> 20} MiB")
            self._more()

    def _more(self) -> None:
        """Read as much again as is waiting, so that a long value is tried a few times and not once a block."""
        self._text, self._at = self._text[self._at :], 0
        data = self._stream.read(max(_READ_BYTES, len(self._text)))
        self._ended = not data
        self._text += self._decoder.decode(data, final=self._ended)
