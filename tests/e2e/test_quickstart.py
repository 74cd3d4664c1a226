"""docs/quickstart.md, run as it stands: shell blocks by sh, Python blocks by python, in one folder, in order."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quickstart.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# what only names of programs are; the checkout's code runs, wherever the installed ones lead
PROGRAMS = {"python": [], "embstore": ["-m", "embstore"], "torchrun": ["-m", "torch.distributed.run"]}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH with the page's programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, arguments in PROGRAMS.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {" ".join(arguments)} "$@"\n')
        program.chmod(0o755)
    return folder


def test_every_command_of_the_quickstart_works(demo_output: Path, programs: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "demo_output").symlink_to(demo_output)
    with gzip.open(work / "hh.jsonl.gz", "wt") as file:
        for line in (demo_output / "prompts.jsonl").read_text().splitlines()[:40]:
            asked = f"\n\nHuman: {' '.join(json.loads(line)['prompt'].split()[:12])}\n\nAssistant:"
            file.write(json.dumps({"chosen": f"{asked} yes", "rejected": f"{asked} no"}) + "\n")
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert [kind for kind, _ in blocks] == ["console", "sh", "sh", "python", "sh", "sh"]
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    said = ""
    for kind, content in blocks:
        if kind == "console":  # make demo, which has everything above as its own steps
            continue
        command = ["sh", "-eu", "-c", content] if kind == "sh" else [sys.executable, "-c", content]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=work, env=environment, timeout=600)
        assert done.returncode == 0, f"{content}\n{done.stderr[-3000:]}"
        said += done.stdout
    assert said.count("step 5/5") == 2  # one process, and two
    assert said.count("step 3/3") == 1
    assert said.count("weights precomputed") == 3
    assert "'reward'" in said  # TRL's own log
    for folder in ("grpo_one", "grpo_two", "kat/grpo_checkpoints/d20"):
        assert (work / folder / "model.safetensors").is_file()
