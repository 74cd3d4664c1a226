"""Datasets of the hub, from a fake one on the loopback device by the ``datasets`` library: which rows, and which commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_hub import COMMIT, fake_hub

pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets", reason="datasets is an extra")

ROOT = Path(__file__).parents[2]
OTHER = "beef" + "0" * 36

# run in a process of its own: the hub's client reads its settings when it is imported
_PROGRAM = """
import dataclasses, json, sys
from embstore.core.config import DatasetChoice
from embstore.core.errors import EmbstoreError
from tests.support.build_fake import CONFIG
from tests.support.fake import FakeSource
from embstore.flow.build import build
from embstore.storage.journal import read_journal
from pathlib import Path

def about(asked):
    config = dataclasses.replace(CONFIG, dataset=DatasetChoice(split=asked.get("split"), config=asked.get("config")))
    try:
        build(asked["prompts"], out=asked["out"], config=config, resume=True, source=FakeSource())
        origin = read_journal(Path(asked["out"])).origin
        return {"texts": json.loads((Path(asked["out"]) / "prompts_list.json").read_text()),
                "origin": origin and dataclasses.asdict(origin)}
    except EmbstoreError as error:
        return {"refused": error.message, "hint": error.hint, "kind": error.kind}

print(json.dumps([about(asked) for asked in json.loads(sys.argv[1])]))
"""


def asked(cache: Path, endpoint: str, *prompts: dict[str, Any], cwd: Path | None = None) -> list[dict[str, Any]]:
    """What a process says that builds from these; an endpoint of "" is no network."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(prompts)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def texts(name: str) -> list[str]:
    return [f"{name} text {row}" for row in range(40)]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two splits, one of two shards; a picture column that must not be decoded, and what every repository has."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for split, number, total in (("train", 0, 2), ("train", 1, 2), ("test", 0, 1)):
        lines = texts(split)[number * 20 : (number + 1) * 20] if total == 2 else texts(split)
        rows = [{"prompt": text, "image": {"bytes": b"no picture", "path": "x.png"}, "src": split} for text in lines]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-{number:05d}-of-{total:05d}.parquet")
    text = {"dtype": "string", "_type": "Value"}
    features = {"info": {"features": {"prompt": text, "image": {"_type": "Image"}, "src": text}}}
    for path in folder.glob("data/*"):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Prompts\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    return folder


def test_a_dataset_is_streamed_at_one_commit_that_is_recorded(repository: Path, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "store"
    with fake_hub({}, datasets={"me/prompts": repository}) as hub:
        unchosen, wrong, built, again = asked(
            cache,
            hub.endpoint,
            {"prompts": "me/prompts", "out": str(tmp_path / "a")},
            {"prompts": "me/prompts", "split": "dev", "out": str(tmp_path / "b")},
            {"prompts": "me/prompts", "split": "train", "out": str(out)},
            {"prompts": f"me/prompts@{COMMIT}", "split": "train", "out": str(out)},
        )
        files = {name for name in hub.sent if name.endswith(".parquet")}
    assert unchosen["refused"] == f"me/prompts@{COMMIT[:12]} contains several splits: train, test"
    assert unchosen["hint"] == "choose one with --split train, or --split all"
    assert wrong["refused"] == f"me/prompts@{COMMIT[:12]} has no split 'dev'; it has train, test"
    assert built.get("texts") == texts("train"), built
    assert built["origin"] == {"dataset": "me/prompts", "revision": COMMIT, "config": None, "split": "train"}
    assert again == built
    assert "me/prompts/data/train-00001-of-00002.parquet" in files
    # another commit is refused by its name, before it is read
    with fake_hub({}, datasets={"me/prompts": repository}, commit=OTHER) as hub:
        (moved,) = asked(cache, hub.endpoint, {"prompts": "me/prompts", "split": "train", "out": str(out)})
        assert not [name for name in hub.sent if name.endswith(".parquet")]
    assert moved["kind"] == "identity-mismatch"
    assert f"dataset.revision: the store has {COMMIT}, given {OTHER}" in moved["refused"]
    assert f"me/prompts@{COMMIT}" in moved["hint"]


def test_configurations_are_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    for config in ("main", "socratic"):
        (folder / config).mkdir(parents=True)
        pq.write_table(pa.table({"prompt": texts(config)}), folder / config / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: main/*.parquet\n"
        "- config_name: socratic\n  data_files: socratic/*.parquet\n---\n"
    )
    with fake_hub({}, datasets={"me/sums": folder}) as hub:
        unchosen, built = asked(
            tmp_path / "cache",
            hub.endpoint,
            {"prompts": "me/sums", "out": str(tmp_path / "a")},
            {"prompts": "me/sums", "config": "socratic", "out": str(tmp_path / "b")},
        )
    assert unchosen["refused"] == f"me/sums@{COMMIT[:12]} contains several configurations: main, socratic"
    assert unchosen["hint"] == "choose one with --config main"
    assert built["texts"] == texts("socratic")


def test_a_script_of_a_dataset_never_runs(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "prompts.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with fake_hub({}, datasets={"me/prompts": folder}) as hub:
        (refused,) = asked(tmp_path / "cache", hub.endpoint, {"prompts": "me/prompts", "out": str(tmp_path / "a")})
    assert "is read by its own script, which embstore does not run" in refused["refused"]
    assert "me/prompts@refs/convert/parquet" in refused["hint"]
    assert not (tmp_path / "ran").exists()


def test_without_a_network_the_cached_snapshot_is_read_or_nothing(repository: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = "import huggingface_hub, sys; huggingface_hub.snapshot_download('me/prompts', repo_type='dataset')"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with fake_hub({}, datasets={"me/prompts": repository}) as hub:
        environment |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.endpoint}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    built, unchosen, unknown = asked(
        cache,
        "",
        {"prompts": "me/prompts", "split": "train", "out": str(tmp_path / "a")},
        {"prompts": "me/prompts", "out": str(tmp_path / "b")},
        {"prompts": "me/unknown", "out": str(tmp_path / "c")},
    )
    assert built.get("texts") == texts("train"), built
    assert built["origin"] == {"dataset": "me/prompts", "revision": COMMIT, "config": None, "split": "train"}
    assert "contains several splits: test, train" in unchosen["refused"]
    assert unknown["refused"].startswith("me/unknown is not a file or folder here, the hub cannot be reached (")
    assert "hf download --repo-type dataset me/unknown" in unknown["hint"]
    # a part of it is no pool
    (shard,) = cache.rglob("train-00001-of-00002.parquet")
    shard.unlink()
    (partial,) = asked(cache, "", {"prompts": "me/prompts", "split": "train", "out": str(tmp_path / "d")})
    assert "does not contain the whole dataset" in partial["refused"] or "lacks data/train-00001" in partial["refused"]


def test_what_lies_here_comes_before_the_hub(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "prompts").write_text('{"prompt": "local"}\n' * 2 + '{"prompt": "file"}\n')
    with fake_hub({}, datasets={"me/prompts": repository}) as hub:
        local, missing, nowhere = asked(
            tmp_path / "cache",
            hub.endpoint,
            {"prompts": "me/prompts", "out": str(tmp_path / "a")},
            {"prompts": "me/typo.jsonl", "out": str(tmp_path / "b")},
            {"prompts": "me/typo", "out": str(tmp_path / "c")},
            cwd=tmp_path,
        )
        assert hub.sent == []
    assert local["texts"] == ["local", "file"]
    assert local["origin"] is None
    assert missing["refused"] == "cannot read prompts me/typo.jsonl: No such file or directory"
    assert nowhere["refused"].startswith("me/typo is neither a file or folder here nor a dataset on the hub")
