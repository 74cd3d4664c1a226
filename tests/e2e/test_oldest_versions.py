"""A store built and verified with the oldest versions that pyproject.toml allows, in an environment of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import small_lines, write_lines

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-oldest" / "bin" / "python"


def _run(*arguments: object, cwd: Path) -> str:
    """What a Python program says in the oldest environment, on the package of this checkout."""
    command = [str(PYTHON), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_oldest_versions_are_the_lower_bounds_of_the_package() -> None:
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = (ROOT / "scripts" / "oldest_versions.txt").read_text().splitlines()
    least = {re.match(r"([\w-]+)>=([\d.]+)", bound).groups() for bound in bounds}  # type: ignore[union-attr]
    assert {(name, version.removesuffix(".*")) for name, _, version in (pin.partition("==") for pin in pins[1:])} == {
        (name, version) for name, version in least if name != "hnswlib"
    }


@pytest.mark.parametrize(("fails", "status"), [("install download", 75), ("install", 1), ("", 0)])
def test_only_an_unreachable_index_is_tolerated(fails: str, status: int, tmp_path: Path) -> None:
    """With a python of which some commands of pip fail: ``download`` of a package that exists fails where no index is."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nfor command in {fails}; do [ "$3" != "$command" ] || exit 2; done\n')
    python.chmod(0o755)
    script = ROOT / "scripts" / "oldest_environment.sh"
    assert subprocess.run([script, sys.executable, tmp_path], check=False).returncode == status
    assert (tmp_path / "installed.txt").exists() == (status == 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_store_is_built_and_verified_with_the_oldest_versions(dtype: str, tmp_path: Path) -> None:
    if not (PYTHON.parents[1] / "installed.txt").exists():
        pytest.skip("no environment with the oldest versions: make test-slow makes it, where packages can be had")
    model = save_model(tmp_path / "model", make_model("llama"), make_tokenizer())
    prompts = write_lines(tmp_path / "prompts.jsonl", small_lines())
    store = tmp_path / "store"
    _run("-m", "embstore", "build", prompts, "--model", model, "--out", store, "--dtype", dtype, cwd=tmp_path)
    assert "70/70" in _run("-m", "embstore", "verify", store, cwd=tmp_path)
    code = "import sys, embstore; print(len(embstore.training.load_weights(sys.argv[1]).array), embstore.__file__)"
    said = _run("-c", code.replace("embstore; ", "embstore.training; "), store, cwd=tmp_path).split()
    assert said == ["70", str(ROOT / "embstore" / "__init__.py")]
