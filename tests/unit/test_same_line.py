"""The line that began a build continues it: each option of the embedding, given explicitly, interrupted, and given again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from embstore.cli import app
from embstore.core.config import EmbeddingConfig
from embstore.model import locate
from embstore.storage.reader import open_store
from embstore.storage.writer import StoreWriter
from tests.oracle.test_nanochat import CONFIG as NANOCHAT
from tests.oracle.test_nanochat import make_state
from tests.support.checkpoints import make_base
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import snapshot, write_lines

pytestmark = pytest.mark.usefixtures("without_syncs")

POSITIONS = 128  # of the model
LINES: dict[str, list[list[str]]] = {
    "model": [[]],
    "revision": [["--model", "org/name", "--revision", "main"]],
    "device": [["--device", "auto"]],
    "dtype": [["--dtype", "auto"], ["--dtype", "bfloat16"]],
    "max_tokens": [["--max-tokens", "5"], ["--max-tokens", "100000"]],
    "vocab": [["--vocab", "tokenizer"]],
    "space": [["--space", "hidden"]],
    "pooling": [["--pooling", "last"]],
    "chat_date": [["--chat-date", "2026-01-31"]],
    "batch_tokens": [["--batch-tokens", "100"]],
    "window_rows": [["--window-rows", "20"], ["--chunk-rows", "10", "--window-rows", "20"]],
    "chunk_rows": [["--chunk-rows", "5", "--window-rows", "15"]],
    "threads": [["--threads", "3"]],
    "compressor": [["--compressor", "none"]],
    "trust_remote_code": [["--trust-remote-code"], ["--model", "nanochat", "--trust-remote-code"]],
    "trust_tokenizer_pickle": [["--model", "nanochat", "--trust-tokenizer-pickle"]],
}
CASES = [(option, line) for option, lines in LINES.items() for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model("llama")
    assert model.config.max_position_embeddings == POSITIONS
    return save_model(tmp_path_factory.mktemp("model") / "llama", model, make_tokenizer())


@pytest.fixture(scope="module")
def nanochat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("nanochat")
    make_base(base, NANOCHAT, make_state())
    (base / "tokenizer" / "tokenizer.json").write_text(
        make_tokenizer(bos=True).backend_tokenizer.to_str().replace("<s>", "<|bos|>")
    )
    return base


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines: list[dict[str, object]] = [{"prompt": f"the sum of {number} and " * (1 + number % 9)} for number in range(40)]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", lines)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class _Stopped(Exception):
    """In place of a kill after the first window."""


def test_every_option_of_the_embedding_is_here() -> None:
    assert LINES.keys() == {field.name for field in dataclasses.fields(EmbeddingConfig)}


@pytest.mark.parametrize(("option", "given"), CASES, ids=[" ".join(line) or option for option, line in CASES])
def test_the_line_that_began_a_build_continues_it(
    option: str,
    given: list[str],
    folder: Path,
    nanochat: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locate, "download", lambda model, revision, *, trusted: folder)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(nanochat))
    line = ["build", prompts, "--knn", "exact", *given]
    for name, value in {"--model": folder, "--device": "cpu", "--threads": 2}.items():
        line += [name, value] if name not in given else []
    line += [] if "--window-rows" in given else ["--chunk-rows", 16, "--window-rows", 16]
    line = ["nanochat:base" if each == "nanochat" else each for each in line]
    store = tmp_path / "store"
    _stop_after_a_window(line, store)
    begun = (store / "spec.json").read_bytes()
    result = _run(*line, "--out", store, "--resume")
    assert result.exit_code == 0, result.output
    assert (store / "spec.json").read_bytes() == begun
    whole = _run(*line, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert snapshot(store) == snapshot(tmp_path / "whole")


def _stop_after_a_window(line: list[Any], store: Path) -> None:
    commit = StoreWriter.commit_window

    def stop(writer: StoreWriter, *arguments: Any) -> Any:
        if writer.state.windows:
            raise _Stopped
        return commit(writer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "commit_window", stop)
        result = _run(*line, "--out", store)
    assert isinstance(result.exception, _Stopped), result.output
    assert open_store(store, partial=True).num_rows == 40
