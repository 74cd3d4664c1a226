"""Files of a store as an attacker would write them: every byte is theirs, checksums and digests included.

Written without the package's own writers: what they refuse to write must be written here.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
from hypothesis import strategies as st

# --- JSON that json.dumps would not write ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Raw:
    """JSON text that stands for itself, such as NaN or a number of 5000 digits."""

    text: str


RAW = [
    Raw("NaN"),
    Raw("-Infinity"),
    Raw("1e400"),
    Raw("9" * 5000),
    Raw("1." + "0" * 5000),
    Raw("[" * 150 + "]" * 150),
    Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a":' * 5000 + "1" + "}" * 5000),
    Raw('"\\ud800"'),
    Raw('{"a": 1, "a": 2}'),
    Raw('"\x00"'),
]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    16,
    69,
    70,
    71,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    10**15,
    -(10**30),
    int("9" * 4000),
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "default",
    "none",
    "../../outside",
    "../outside/weights/mine",
    "/etc/passwd",
    "a/b",
    ".",
    "..",
    "\0",
    "[/red]",
    "[bold]a",
    "\x1b[2J\x9b31m\x07",
    "\u202egnp.exe",
    "ü\u2028",
    "a" * 20_000,
    "0" * 64,
    "0" * 8,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    {"../x": {"bytes": 1, "sha256": "0" * 64}},
]
HOSTILE = st.sampled_from([*VALUES, *RAW]) | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False)


def dumps(value: object) -> bytes:
    """JSON with every ``Raw`` in place."""
    raws: list[Raw] = []

    def place(item: object) -> str:
        if not isinstance(item, Raw):
            raise TypeError(item)
        raws.append(item)
        return f"@raw-{len(raws) - 1}@"

    text = json.dumps(value, default=place, separators=(",", ":"), allow_nan=True)
    for index, raw in enumerate(raws):
        text = text.replace(f'"@raw-{index}@"', raw.text)
    return text.encode("utf-8", "surrogatepass")


def mutated(value: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """A JSON value with one to three places replaced, removed, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(_places(value)))
        if parent is None:
            if draw(st.integers(0, 9)) == 0:
                return copy.deepcopy(draw(HOSTILE))
            continue
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            parent[key] = copy.deepcopy(draw(HOSTILE))
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(draw(st.sampled_from(parent) | HOSTILE)))
        else:
            parent[draw(st.sampled_from([item for item in VALUES if isinstance(item, str)]))] = copy.deepcopy(parent[key])
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    places: list[tuple[Any, Any]] = [(None, None)]
    todo = [value]
    while todo:
        item = todo.pop()
        if not isinstance(item, dict | list):
            continue
        keys = list(item) if isinstance(item, dict) else list(range(min(len(item), 5)))
        places += [(item, key) for key in keys]
        todo += [item[key] for key in keys]
    return places


# --- checksums and digests that fit ----------------------------------------------------------------------------------


def journal_of(store: Path) -> list[Any]:
    """Values of a journal's lines, ``seq`` included."""
    return [json.loads(line.rpartition(b"\t")[0]) for line in (store / "journal.jsonl").read_bytes().splitlines()]


def write_journal(store: Path, lines: list[Any]) -> None:
    """A journal whose lines have the checksums that fit them, whatever they hold."""
    bodies = [dumps(line) for line in lines]
    (store / "journal.jsonl").write_bytes(b"".join(body + b"\t%08x\n" % zlib.crc32(body) for body in bodies))


def manifest_of(store: Path) -> Any:
    """The manifest as a value."""
    return json.loads((store / "manifest.json").read_bytes())


def reseal(store: Path) -> None:
    """Make journal, chunk table and manifest say what the store's other files now hold."""
    lines = journal_of(store)
    spec = json.loads((store / "spec.json").read_bytes()) if _is_json(store / "spec.json") else {}
    table = []
    for line in lines:
        for name in line.get("files", {}):
            line["files"][name] = digest(store / name)
        for chunk in line.get("chunks", []):
            chunk.update(_reseal_chunk(store / f"embeddings.zarr/c.{chunk['index']}.0"))
            table.append([chunk["index"], chunk["bytes"], chunk["crc32c"]])
        if line["record"] == "window":
            for name in ("coordinates", "residuals", *(["sequences"] if "sequences_crc32c" in line else [])):
                line[f"{name}_crc32c"] = _slice_crc(store / f"{name}.npy", line, spec)
    write_journal(store, lines)
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in table)
    head = '{"format_version":1,"columns":["index","bytes","crc32c"],"chunks":[\n'
    (store / "chunks.json").write_text(f"{head}{rows}\n]}}\n")
    reseal_manifest(store)


def reseal_manifest(store: Path) -> None:
    """Digests in the manifest, and in the journal's file lists, as the files are."""
    lines = journal_of(store)
    for line in lines:
        for name in line.get("files", {}):
            line["files"][name] = digest(store / name)
    write_journal(store, lines)
    if (store / "manifest.json").exists():
        manifest = manifest_of(store)
        manifest["files"] = {name: digest(store / name) for name in manifest["files"]}
        (store / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def digest(path: Path) -> dict[str, Any]:
    """Size and sha256 as the manifest has them."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _is_json(path: Path) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(path.read_bytes()), dict)
    return False


def _reseal_chunk(path: Path) -> dict[str, Any]:
    """Give a chunk file the trailer that fits its body."""
    body = path.read_bytes()[:-4]
    crc = google_crc32c.value(body)
    path.write_bytes(body + crc.to_bytes(4, "little"))
    return {"bytes": len(body) + 4, "crc32c": f"{crc:08x}"}


def _slice_crc(path: Path, window: Any, spec: Any) -> str:
    width = 8 if path.name == "sequences.npy" else 4
    if path.name == "coordinates.npy":
        rank = spec.get("embedding", {}).get("rank") if isinstance(spec.get("embedding"), dict) else None
        width = 4 * rank if isinstance(rank, int) and 0 < rank < 100 else 48
    content = path.read_bytes()
    return f"{google_crc32c.value(content[128 + window['start'] * width : 128 + window['stop'] * width]):08x}"


# --- bytes -----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
    """Bytes with one to three of them cut, flipped, doubled, replaced or added."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from([0, 1, 2, 16, 10_000])))
        middle = draw(
            st.sampled_from(
                [
                    b"",
                    b"\0",
                    b"\n",
                    b"\r",
                    b"\xff\xfe",
                    b"\xef\xbb\xbf",
                    b"[" * 3000,
                    b'"',
                    b"9" * 30,
                    content[start:stop] * 2,
                ]
            )
            | st.binary(max_size=8)
        )
        content = content[:start] + middle + content[stop:]
    return content


def _header(text: str, *, version: bytes = b"\x01\x00", size: int | None = None, width: int = 2) -> bytes:
    body = text.encode() + b" " * max(0, 127 - 8 - width - len(text)) + b"\n"
    return b"\x93NUMPY" + version + (len(body) if size is None else size).to_bytes(width, "little") + body


def _array(descr: str, shape: str, order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


HEADERS = [
    _header(_array("'|O'", "(70,)")),
    _header(_array("'<f4'", "(70,)", "True")),
    _header(_array("'<f4'", "(1152921504606846976, 16)")),
    _header(_array("'<f4'", "(99999999999999999999,)")),
    _header(_array("'<f4'", "(-70,)")),
    _header(_array("'<f4'", "()")),
    _header(_array("'<f4'", "(" + "1, " * 60 + ")")),
    _header(_array("'<f8'", "(35,)")),
    _header(_array("'>f4'", "(70,)")),
    _header(_array("'<U4'", "(70,)")),
    _header(_array("'<V9'", "(70,)")),
    _header(_array("[('a', '<f4')]", "(70,)")),
    _header(_array("'<f4'", "__import__('os').abort()")),
    _header("(" * 60 + ")" * 60),
    _header("9" * 5000),
    _header("{'descr': '<f4'}"),
    _header(_array("'<f4'", "(70,)"), version=b"\x02\x00", width=4),
    _header(_array("'<f4'", "(70,)"), version=b"\x03\x00", width=4),
    _header(_array("'<f4'", "(70,)"), version=b"\x09\x00"),
    _header(_array("'<f4'", "(70,)"), size=65_535),
    _header(_array("'<f4'", "(70,)"), size=0),
    b"\x93NUMPY",
    b"",
    b"PK\x03\x04" + bytes(124),
    b"\x80\x04\x95" + bytes(125),
]
