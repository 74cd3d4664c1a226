"""Pools of chats at the command line, with a real template: what it refuses, and what was cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from embstore.cli import app
from embstore.storage.journal import read_journal
from embstore.storage.reader import open_store
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import write_lines

# as those of Gemma and Mistral: no system role, and turns that alternate
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m['content'] | trim + '\n' }}{% endfor %}"
)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "saw", "two", "red", "birds", "fly", "over", "green", "hills", "at", "noon"]
SMALL = ["--window-rows", "32", "--chunk-rows", "16", "--threads", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer(template=True)
    tokenizer.chat_template = STRICT
    return save_model(tmp_path_factory.mktemp("model") / "tiny", make_model("llama"), tokenizer)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["build", *map(str, arguments)])


def text(number: int) -> str:
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 9)) + f" {number}"


def user(number: int) -> dict[str, str]:
    return {"role": "user", "content": text(number)}


def pool(path: Path, refused: Sequence[int], *, without: Sequence[int] = ()) -> Path:
    lines = []
    for number in range(100):
        messages = [user(number)]
        if number in refused:
            messages += [user(number + 1)] if number % 2 else []
            messages = messages if number % 2 else [{"role": "system", "content": "Answer briefly."}, *messages]
        if number not in without:
            lines.append({"id": f"c{number}", "messages": messages})
    return write_lines(path, lines)


def test_refused_chats_are_named_before_the_pass_and_keep_their_numbers(model: Path, tmp_path: Path) -> None:
    prompts, store = pool(tmp_path / "p.jsonl", [80, 91, 97]), tmp_path / "store"
    command = [prompts, "--model", model, "--out", store, *SMALL]
    result = run(*command)
    assert result.exit_code == 1, result.stderr
    for says in (
        "refuses 3 of 100 chats",
        "'c80' (row 80): System role not supported",
        "'c91' (row 91): Roles must alternate",
    ):
        assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert read_journal(store).spec is None, "the model was probed"
    assert [json.loads(line)["row"] for line in (store / "refused.jsonl").read_text().splitlines()] == [80, 91, 97]
    result = run(*command, "--resume", "--on-error", "quarantine")
    assert result.exit_code == 0, result.stderr
    assert "warning: 3 of 100 lines (3.0%)" in result.stderr
    assert "3 rows without a vector (the chat template refuses it: 3)" in result.stdout
    opened = open_store(store)
    reasons = {failed.row: failed.reason for failed in opened.journal.failed}
    assert list(reasons) == [80, 91, 97]
    assert reasons[97] == "the chat template refuses it: Roles must alternate"
    # all the others have the rows of a pool without them
    mended = tmp_path / "mended"
    assert (
        run(pool(tmp_path / "m.jsonl", [], without=[80, 91, 97]), "--model", model, "--out", mended, *SMALL).exit_code == 0
    )
    whole = open_store(mended)
    common = [prompt_id for prompt_id in opened.ids if prompt_id in whole.aliases]
    assert len(common) == 97
    difference = opened.rows(common).astype("f4") - whole.rows(common).astype("f4")
    assert float((difference**2).sum(axis=1).max()) ** 0.5 < 5e-4


def test_a_corrected_pool_goes_on_by_the_same_command(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    prompts = pool(tmp_path / "p.jsonl", [91])
    command = [prompts, "--model", model, "--out", store, *SMALL, "--resume"]
    assert run(*command).exit_code == 1
    pool(prompts, [])
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert "so it is begun again: the prompts differ" in result.stderr
    assert open_store(store).journal.failed == []


def test_different_prompts_that_were_cut_to_the_same_are_named(model: Path, tmp_path: Path) -> None:
    head = text(3)
    lines: list[object] = [
        {"id": f"c{n}", "messages": [{"role": "user", "content": f"{head} {text(n)}"}]} for n in range(40)
    ]
    lines += [{"id": f"s{n}", "prompt": f"mat {n}"} for n in range(40)]
    prompts = write_lines(tmp_path / "p.jsonl", lines)
    result = run(prompts, "--model", model, "--out", tmp_path / "store", "--max-tokens", "30", *SMALL)
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "40 of 80 prompts (50.0%) were cut at 30 tokens" in shown
    assert (
        "40 different prompts share a vector with others, in 1 group, because they were cut (such as 'c0' and 'c1')" in shown
    )
    assert "--max-tokens" in shown
    result = run(prompts, "--model", model, "--out", tmp_path / "long", "--max-tokens", "500", *SMALL)
    assert "because they were cut" not in result.stdout
