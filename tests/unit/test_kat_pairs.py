"""The kat scripts up to unique prompts: pairs from files and data sets, both formats, ids as the original has them."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest

from embstore.core.errors import ConfigError, PromptError
from scripts import kat_download_pairs, kat_make_prefixes, kat_make_prompts
from scripts.kat_compute_embeddings_offline import find_prompts
from tests.support.stores import write_lines

TRANSCRIPTS = [
    ("\n\nHuman: What is  seven?\n\nAssistant: A number.", "\n\nHuman: What is  seven?\n\nAssistant: No."),
    (
        "\n\nHuman: Hello\nyou\n\nAssistant: Hi.\n\nHuman: Why?\n\nAssistant: Because\n\nof that.",
        "\n\nHuman: Hello\nyou\n\nAssistant: Hi.\n\nHuman: Why?\n\nAssistant: None.",
    ),
    ("\n\nHuman: What is seven?\n\nAssistant: 7", "\n\nHuman: What is seven?\n\nAssistant: 8"),
    ("\n\nHuman: Unanswered?", "\n\nHuman: Unanswered?\n\nAssistant: x"),
    ("no markers", "at all"),
]


def original_id(first_user_message: str) -> str:
    """As the original's documentation has it: md5 of the message with single spaces, 16 hex digits."""
    return hashlib.md5(re.sub(r"\s+", " ", first_user_message.strip()).encode()).hexdigest()[:16]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def transcripts(tmp_path: Path) -> Path:
    path = tmp_path / "hh.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in TRANSCRIPTS)
    return path


def test_transcripts_become_pairs_whose_prefix_ends_with_the_user(base: Path, transcripts: Path) -> None:
    kat_download_pairs.main(["--from-files", str(transcripts)])
    pairs = read(base / "data" / "pairs_all.jsonl")
    assert [list(pair) for pair in pairs] == [["id", "prefix", "chosen", "rejected", "src", "prefix_id"]] * 3
    assert len({uuid.UUID(pair.pop("id")) for pair in pairs}) == 3
    assert pairs[0] == {
        "prefix": {"messages": [{"role": "user", "content": "What is seven?"}]},
        "chosen": "A number.",
        "rejected": "No.",
        "src": "hh-rlhf",
        "prefix_id": original_id("What is seven?"),
    }
    assert pairs[1]["prefix"]["messages"] == [
        {"role": "user", "content": "Hello you"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Why?"},
    ]
    assert (pairs[1]["chosen"], pairs[1]["prefix_id"]) == ("Because of that.", original_id("Hello you"))


def test_the_same_files_give_the_same_bytes(base: Path, transcripts: Path) -> None:
    outs = [base / name for name in ("one.jsonl", "two.jsonl")]
    for out in outs:
        kat_download_pairs.main(["--from-files", str(transcripts), "--out", str(out)])
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_files_without_a_pair_end_with_an_error_and_leave_nothing(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"chosen": "no marker", "rejected": ""}\n[1]\n')
    with pytest.raises(PromptError, match="no pair was found in 2 records"):
        kat_download_pairs.main(["--from-files", str(path)])
    assert list((base / "data").iterdir()) == []
    path.write_text("{}\nnot json\n")
    with pytest.raises(PromptError, match=r"line 2 of .*other.jsonl is not JSON"):
        kat_download_pairs.main(["--from-files", str(path)])


def test_data_sets_are_read_as_they_are_published(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    published: dict[str, list[dict[str, Any]]] = {
        "Anthropic/hh-rlhf": [{"chosen": TRANSCRIPTS[0][0], "rejected": TRANSCRIPTS[0][1]}],
        "HuggingFaceH4/ultrafeedback_binarized": [
            {
                "prompt": "Sum?",
                "chosen": [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "Yes."}],
                "rejected": [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "No."}],
            },
            {"prompt": "Plain?", "chosen": "as text", "rejected": "also text"},
        ],
        "HuggingFaceH4/stack-exchange-preferences": [
            {
                "question": "<p>How <b>so</b>?</p>",
                "answers": [
                    {"text": "<p>worst</p>", "pm_score": 0},
                    {"text": "best", "pm_score": 4},
                    {"text": "x", "pm_score": 1},
                ],
            },
            {"question": "one answer", "answers": [{"text": "alone", "pm_score": 4}]},
            {"question": "a tie", "answers": [{"text": "a", "pm_score": 1}, {"text": "b", "pm_score": 1}]},
        ],
    }

    def load_dataset(name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return published[name]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    kat_download_pairs.main([])
    pairs = read(base / "data" / "pairs_all.jsonl")
    assert asked == [
        ("Anthropic/hh-rlhf", "train"),
        ("Anthropic/hh-rlhf", "test"),
        ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
        ("HuggingFaceH4/stack-exchange-preferences", "train"),
    ]
    assert [
        (pair["prefix"]["messages"][-1]["content"], pair["chosen"], pair["rejected"], pair["src"]) for pair in pairs
    ] == [
        ("What is seven?", "A number.", "No.", "hh-rlhf"),
        ("What is seven?", "A number.", "No.", "hh-rlhf"),
        ("Sum?", "Yes.", "No.", "ultrafeedback-binarized"),
        ("Plain?", "as text", "also text", "ultrafeedback-binarized"),
        ("How so ?", "best", "worst", "stack-exchange-preferences"),
    ]
    asked.clear()
    kat_download_pairs.main(["--only", "uf"])
    assert [name for name, _ in asked] == ["HuggingFaceH4/ultrafeedback_binarized"]
    asked.clear()
    kat_download_pairs.main(["--no-uf", "--no-se"])
    assert {name for name, _ in asked} == {"Anthropic/hh-rlhf"}
    with pytest.raises(ConfigError, match="every data set is left out"):
        kat_download_pairs.main(["--only", "hh", "--no-hh"])


def test_a_failed_download_names_the_data_set_and_leaves_the_old_file(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "data").mkdir(parents=True)
    (base / "data" / "pairs_all.jsonl").write_text("old\n")

    def load_dataset(name: str, *, split: str) -> Any:
        if split == "test":
            raise ConnectionError("no network")
        return [{"chosen": TRANSCRIPTS[0][0], "rejected": TRANSCRIPTS[0][1]}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(PromptError, match="Anthropic/hh-rlhf cannot be downloaded: no network"):
        kat_download_pairs.main([])
    assert (base / "data" / "pairs_all.jsonl").read_text() == "old\n"


LINES = [
    {
        "prefix": {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "A  b\tc"}]},
        "src": "x",
    },
    {"prefix": {"messages": [{"role": "user", "content": "a"}]}, "prompt": "the newer field counts", "src": "x"},
    {"prompt": " A b\n c ", "src": "y"},
    {"prompt": "d é", "src": "y"},
    {"prefix": {"messages": [{"role": "assistant", "content": "no user here"}]}},
    {"chosen": "no prompt"},
]


@pytest.mark.parametrize("script", [kat_make_prefixes, kat_make_prompts])
def test_unique_prompts_in_both_formats(base: Path, script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = base / "data"
    data.mkdir(parents=True)
    (data / "pairs_all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + "no JSON\n")
    script.main([])
    ids = [original_id(text) for text in ("A b c", "a", "d é")]
    if script is kat_make_prompts:
        assert read(data / "prompts_all.jsonl") == [
            {"id": ids[0], "prompt": "A b c"},
            {"id": ids[1], "prompt": "a"},
            {"id": ids[2], "prompt": "d é"},
        ]
        id_map, noun = data / "prompt_id_map.tsv", "prompts"
    else:
        assert read(data / "prefixes_all.jsonl") == [
            {"id": ids[0], "prefix": LINES[0]["prefix"]},
            {"id": ids[1], "prefix": LINES[1]["prefix"]},
            {"id": ids[2], "prefix": {"messages": [{"role": "user", "content": "d é"}]}},
        ]
        id_map, noun = data / "prefix_id_map.tsv", "prefixes"
    assert id_map.read_text(encoding="utf-8") == f"{ids[0]}\tA b c\n{ids[1]}\ta\n{ids[2]}\td é\n"
    assert (data / "stats.txt").read_text() == (
        f"total_pairs: 4\nunique_{noun}: 3\ndedup_ratio: 75.00%\nsource_breakdown: {{'x': 2, 'y': 2}}\n"
    )
    said = capsys.readouterr().out
    assert "skipped line 6 of pairs_all.jsonl: no prompt" in said
    assert "skipped line 7 of pairs_all.jsonl: not JSON" in said
    assert "skipped 1 pairs without a user message" in said


def test_tools_stay_with_their_prefix(base: Path) -> None:
    (base / "data").mkdir(parents=True)
    pair = {"chosen": "a", "rejected": "b", "src": "s"}
    tools = [{"type": "function", "function": {"name": "w"}}]
    prefixes = [{"prefix": {"messages": [{"role": "user", "content": text}]}} for text in ("with", "without")]
    lines = [{**prefixes[0], "tools": tools, **pair}, {**prefixes[1], "tools": None, **pair}]
    write_lines(base / "data" / "pairs_all.jsonl", lines)
    kat_make_prefixes.main([])
    written = read(base / "data" / "prefixes_all.jsonl")
    assert [{**line, "id": None} for line in written] == [
        {"id": None, **prefixes[0], "tools": tools},
        {"id": None, **prefixes[1]},
    ]


def test_a_missing_file_of_pairs_names_the_command_that_makes_it(base: Path) -> None:
    with pytest.raises(PromptError, match=r"pairs_all.jsonl does not exist") as caught:
        kat_make_prefixes.main([])
    assert caught.value.hint == "run python -m scripts.kat_download_pairs"


def test_pairs_without_a_user_message_are_an_error(base: Path) -> None:
    (base / "data").mkdir(parents=True)
    (base / "data" / "pairs_all.jsonl").write_text(json.dumps(LINES[4]) + "\n")
    with pytest.raises(PromptError, match="no prompt with a user message"):
        kat_make_prompts.main([])
    assert [path.name for path in (base / "data").iterdir()] == ["pairs_all.jsonl"]


def test_whichever_file_of_prompts_exists_is_taken_and_both_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"prefixes_all.jsonl does not exist") as caught:
        find_prompts(tmp_path)
    assert caught.value.hint == "run python -m scripts.kat_make_prefixes"
    (tmp_path / "prompts_all.jsonl").touch()
    assert find_prompts(tmp_path) == tmp_path / "prompts_all.jsonl"
    (tmp_path / "prefixes_all.jsonl").touch()
    with pytest.raises(ConfigError, match=r"both prefixes_all.jsonl and prompts_all.jsonl") as both:
        find_prompts(tmp_path)
    assert "--prompts_path" in str(both.value.hint)
