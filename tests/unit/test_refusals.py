"""What the command line says and returns when it refuses: exit codes, what there is instead, any terminal's encoding."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from embstore.cli import app
from embstore.cli.frame import replace_unencodable
from embstore.core.errors import ConfigError, ModelError, StorageError
from embstore.core.files import storage_errors
from embstore.host import allocator
from embstore.model.hub import download
from embstore.storage.reader import open_store
from tests.support.stores import build_small, small_lines, write_lines

FOREIGN = "ümlaut, 漢字, 🙂"


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command; a traceback fails the test."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


# --- the file system --------------------------------------------------------------------------------------------------


def no_space(handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


READING = {
    "export": ["export", "STORE", "--out", "OUT"],
    "kat": ["export", "STORE", "--out", "OUT", "--format", "kat"],
    "parquet": ["export", "STORE", "--out", "OUT", "--format", "parquet"],
    "html": ["inspect", "STORE", "--html", "OUT.html"],
    "png": ["inspect", "STORE", "--png", "OUT.png"],
    "resample": ["resample", "STORE", "--dataset", "PROMPTS", "--out", "OUT.jsonl"],
    "weights": ["weights", "STORE", "--gamma", "2"],
}


def command(name: str, store: Path, prompts: Path, out: Path) -> list[str]:
    places = {"STORE": str(store), "PROMPTS": str(prompts)}
    return [places.get(word, word.replace("OUT", str(out))) for word in READING[name]]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lines of the small store that are JSON, for ``resample``."""
    return write_lines(tmp_path_factory.mktemp("lines") / "lines.jsonl", small_lines())


@pytest.mark.parametrize("name", READING)
def test_a_full_disk_is_1_where_there_is_nothing_to_resume(
    name: str, store: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    code, shown, told = run(*command(name, store, lines, tmp_path / "out"))
    assert (code, shown) == (1, "")
    assert os.strerror(errno.ENOSPC) in told
    assert "hint: free some space, then run the command again\n" in told


@pytest.mark.parametrize("name", ["html", "png", "resample"])
def test_a_folder_that_is_missing_is_named(name: str, finished_store: Path, lines: Path, tmp_path: Path) -> None:
    code, _, told = run(*command(name, finished_store, lines, tmp_path / "no" / "such" / "out"))
    assert code == 1
    assert f"create the folder {tmp_path / 'no'}, then run the command again" in told


@pytest.mark.parametrize("name", ["export", "kat", "parquet"])
def test_a_file_in_place_of_the_folder_is_said(name: str, finished_store: Path, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    code, _, told = run(*command(name, finished_store, lines, tmp_path / "out"))
    assert code == 1
    assert str(tmp_path / "out") in told
    assert "--resume" not in told
    assert (tmp_path / "out").read_text() == "mine"


def test_a_build_that_a_full_disk_ends_is_6_and_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((80, 8)).astype(np.float32))
    real, calls = os.fsync, 0

    def fails_later(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 25:
            no_space(handle)
        real(handle)

    words = ["import", tmp_path / "rows.npy", "--out", tmp_path / "store", "--window-rows", "16", "--chunk-rows", "16"]
    monkeypatch.setattr(os, "fsync", fails_later)
    code, _, told = run(*words, "--threads", "1")
    assert code == 6, told
    assert "free some space, then run the command again: with --resume it continues where it stopped" in told
    monkeypatch.setattr(os, "fsync", real)
    assert run(*words, "--threads", "1", "--resume")[0] == 0


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free some space, then run the command again"),
        (errno.EDQUOT, "free some space, then run the command again"),
        (errno.EMFILE, "close some files or raise the limit (ulimit -n), then run the command again"),
        (errno.ENOMEM, "free some memory, then run the command again"),
        (errno.EACCES, "make the folder FOLDER writable, or choose another place"),
        (errno.EROFS, "make the folder FOLDER writable, or choose another place"),
        (errno.EEXIST, "something else has this name: remove it, or choose another name"),
        (errno.EISDIR, "something else has this name: remove it, or choose another name"),
        (errno.ENOTDIR, "something else has this name: remove it, or choose another name"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ENOENT, "check the path, then run the command again"),
        (errno.EIO, "fix the file system, then run the command again"),
        (errno.ESTALE, "fix the file system, then run the command again"),
    ],
)
def test_each_failure_of_the_file_system_has_its_next_step(code: int, hint: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, storage_errors("creating", tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    assert caught.value.hint == hint.replace("FOLDER", str(tmp_path))


# --- what there is instead --------------------------------------------------------------------------------------------


def test_an_unknown_field_is_2_and_lists_those_there_are(finished_store: Path, tmp_path: Path) -> None:
    for more in ([], ["--html", tmp_path / "r.html"], ["--json"]):
        code, shown, told = run("inspect", finished_store, "--by", "colour", *more)
        assert (code, shown) == (2, "")
        assert "no prompt has a field 'colour'" in told
        assert "the input lines have src" in told
    assert not (tmp_path / "r.html").exists()


def test_an_unknown_id_is_2_and_lists_those_there_are(finished_store: Path) -> None:
    store = open_store(finished_store)
    code, shown, told = run("inspect", finished_store, "--neighbors", "nobody")
    assert (code, shown) == (2, "")
    assert f"no prompt has the id 'nobody'; the store has {len(store.aliases)} ids, such as " in told
    some = told.splitlines()[0].partition("such as ")[2].split(", ")
    assert (len(some), set(some) <= set(store.aliases)) == (10, True)
    for near in ("GIVEN", "iven-"):
        assert "such as given-0, given-1\n" in run("inspect", finished_store, "--neighbors", near)[2]
    with pytest.raises(ConfigError, match="no prompt has the id ''; the store has"):
        store.row_of("")
    with pytest.raises(ConfigError, match=r"no prompt has the id 'a\\x1b\[31mb'"):
        store.row_of("a\x1b[31mb")


@pytest.mark.parametrize("option", ["--key-column", "--id-column"])
def test_an_unknown_column_is_2_and_lists_those_there_are(
    option: str, finished_store: Path, lines: Path, tmp_path: Path
) -> None:
    code, _, told = run("resample", finished_store, "--dataset", lines, "--out", tmp_path / "o.jsonl", option, "colour")
    assert code == 2
    assert "'colour'; it has prompt, src" in told
    assert not (tmp_path / "o.jsonl").exists()


HUB = (
    "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing traffic "
    "has been disabled. To enable repo look-ups and downloads online, set 'HF_HUB_OFFLINE=0' as environment variable."
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (HUB, HUB),
        ("404 Client Error.\n\nRepository Not Found.\n", "404 Client Error. Repository Not Found."),
        (f"{HUB} {HUB}", HUB),
        ("", "ValueError"),
    ],
)
def test_what_the_hub_says_ends_with_a_sentence(words: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError(words)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        download("nosuch/model-xyz", None, trusted=False)
    assert str(caught.value) == f"nosuch/model-xyz is not a local folder, and the hub answered: {expected}"


# --- encodings --------------------------------------------------------------------------------------------------------

ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.fixture(scope="module")
def foreign_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose folder, prompts, ids and fields cannot be written in ASCII."""
    folder = tmp_path_factory.mktemp("foreign")
    lines = [{"id": f"{FOREIGN} {row}", "prompt": f"{FOREIGN} {row}", "src": FOREIGN} for row in range(12)]
    store = folder / "größe 漢"
    build_small(write_lines(folder / "prompts.jsonl", lines), store)
    return store


SHOWN: dict[str, Callable[[Path], list[object]]] = {
    "inspect": lambda store: ["inspect", store, "--by", "src"],
    "inspect of a neighbour": lambda store: ["inspect", store, "--neighbors", f"{FOREIGN} 3"],
    "verify": lambda store: ["verify", store],
    "weights": lambda store: ["weights", store, "--list"],
    "compare": lambda store: ["compare", store, store],
    "an unknown id": lambda store: ["inspect", store, "--neighbors", FOREIGN + "?"],
    "an unknown store": lambda store: ["inspect", store / FOREIGN],
    "help": lambda store: ["build", "--help-all"],
}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", SHOWN)
def test_what_a_terminal_cannot_encode_is_replaced(
    name: str, encoding: str, foreign_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {each: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for each in ("stdout", "stderr")}
    for each, stream in streams.items():
        monkeypatch.setattr(sys, each, stream)
    replace_unencodable()
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in SHOWN[name](foreign_store)])
    printed = {}
    for each, stream in streams.items():
        stream.flush()
        printed[each] = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert ended.value.code == {"an unknown id": 2, "an unknown store": 1}.get(name, 0)
    said = printed["stdout" if ended.value.code == 0 else "stderr"]
    assert said
    assert "?" in said or "\\" in said or name in ("help", "weights", "verify")


JSON: dict[str, Callable[[Path], list[object]]] = {
    "inspect": lambda store: ["inspect", store, "--by", "src", "--json"],
    "neighbours": lambda store: ["inspect", store, "--neighbors", f"{FOREIGN} 3", "--json"],
    "compare": lambda store: ["compare", store, store, "--json"],
}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", JSON)
def test_json_is_the_same_value_in_every_encoding(
    name: str, encoding: str, foreign_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = []
    for each in ("utf-8", encoding):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=each)
        monkeypatch.setattr(sys, "stdout", stream)
        replace_unencodable()
        with pytest.raises(SystemExit):
            app([str(word) for word in JSON[name](foreign_store)])
        stream.flush()
        values.append(json.loads(stream.buffer.getvalue().decode(each)))  # type: ignore[attr-defined]
    assert values[0] == values[1]
    assert "größe 漢" in json.dumps(values[0], ensure_ascii=False) or FOREIGN in json.dumps(values[0], ensure_ascii=False)


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_installed_command_prints_in_any_encoding(name: str, foreign_store: Path) -> None:
    environment = {**os.environ, "PYTHONUTF8": "0", **ENCODINGS[name]}
    words = [sys.executable, "-m", "embstore", "inspect", str(foreign_store)]
    done = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"weight, in units of the mean" in done.stdout
    assert b"####" in done.stdout
    assert b"?" in done.stdout


# --- the allocator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1 << 25, 1 << 40])
def test_an_old_c_library_keeps_the_largest_blocks_that_it_can(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.35, glibc refuses a threshold above 32 MiB and keeps its own, which is smaller."""
    kept: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        if option == -3 and value > most:
            return 0
        kept[option] = value
        return 1

    def found(name: str) -> Any:
        return mallopt if name == "mallopt" else None

    monkeypatch.setattr(allocator, "_glibc", found)
    allocator.keep_large_blocks()
    assert kept == {-3: min(most, 1 << 28), -1: 1 << 28}


@pytest.mark.parametrize("option", [("--by", "src"), ("--name", "flat")])
def test_weights_of_an_unfinished_store_are_refused_and_not_left_out(option: tuple[str, str], partial_store: Path) -> None:
    code, out, told = run("inspect", partial_store, *option)
    assert (code, out) == (6, "")
    assert "is not finished: 32 of 70 rows are committed" in told
    assert run("inspect", partial_store)[0] == 0
