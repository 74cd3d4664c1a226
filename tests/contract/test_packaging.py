"""What is published: an sdist that makes the wheel, and a wheel that works in an environment of its own."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import embstore

ROOT = Path(embstore.__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
OTHER_PYTHONS = ("3.11", "3.12", "3.13")


def _run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, made by the build backend as a publisher's tool asks for it."""
    folder = tmp_path_factory.mktemp("sdist")
    _run(sys.executable, "-c", f"import hatchling.build; print(hatchling.build.build_sdist({str(folder)!r}))", cwd=ROOT)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist makes, away from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(*PIP, "wheel", sdist, "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds the wheel and, by path only, the dependencies of this one; its ``bin`` folder."""
    folder = tmp_path_factory.mktemp("environment")
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    _run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    here = _run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (site / "dependencies.pth").write_text(f"{here}\n")  # after the wheel, and its own .pth files are not followed
    return folder / "bin"


def test_sdist_holds_what_the_wheel_and_the_tests_are_made_of(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = ["pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "embstore/py.typed", "docs/format.md"]
    expected += ["tests/conftest.py", "scripts/demo.py", "benchmarks/acceptance.py", "tests/format/data/v1/manifest.json"]
    assert [name for name in expected if name not in names] == []
    assert not any(name.startswith((".git/", ".venv", "demo_output")) for name in names)


def test_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(metadata_name))
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert metadata["Name"] == "embstore"
    assert metadata["Version"] == embstore.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    assert [version for version in OTHER_PYTHONS if f"Programming Language :: Python :: {version}" not in classifiers] == []
    assert {"parquet", "peft", "report"} <= set(metadata.get_all("Provides-Extra") or [])
    assert "embstore = embstore.cli:main" in entry_points
    beside_modules = [path for pattern in ("*.jinja", "*.js", "*.css") for path in (ROOT / "embstore").rglob(pattern)]
    assert len(beside_modules) >= 5
    assert {"embstore/py.typed", *(path.relative_to(ROOT).as_posix() for path in beside_modules)} <= set(names)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "embstore").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}, "the package, whole, and nothing else"


def test_the_installed_command_builds_and_trains(environment: Path, tmp_path: Path) -> None:
    """The wheel's own command, not the checkout's."""
    assert _run(environment / "embstore", "--version", cwd=tmp_path) == f"embstore {embstore.__version__}\n"
    where = _run(environment / "python", "-c", "import embstore; print(embstore.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(environment.parent)
    from tests.support.models import make_model, make_tokenizer, save_model
    from tests.support.stores import small_lines, write_lines

    model = save_model(tmp_path / "model", make_model("llama"), make_tokenizer())
    prompts = write_lines(tmp_path / "prompts.jsonl", small_lines()[:30])
    store = tmp_path / "store"
    _run(environment / "embstore", "build", prompts, "--model", model, "--out", store, "--threads", "1", cwd=tmp_path)
    code = "import sys; from embstore.training import load_weights; print(len(load_weights(sys.argv[1], expect_len=30)))"
    assert _run(environment / "python", "-c", code, store, cwd=tmp_path) == "30\n"


def test_types_are_seen_from_outside(environment: Path, tmp_path: Path) -> None:
    """A user's type checker reads the installed package's annotations: a wrong argument is found."""
    mypy = shutil.which("mypy", path=str(Path(sys.executable).parent))
    if mypy is None:
        pytest.skip("mypy is not installed")
    (tmp_path / "good.py").write_text("from embstore.training import load_weights\nload_weights('s', expect_len=3)\n")
    (tmp_path / "bad.py").write_text("from embstore.training import load_weights\nload_weights('s', expect_len='three')\n")
    check = [mypy, "--python-executable", environment / "python", "--no-incremental", "--follow-imports", "silent"]
    _run(*check, "good.py", cwd=tmp_path)
    done = subprocess.run([*map(str, check), "bad.py"], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert 'incompatible type "str"' in done.stdout, done.stdout + done.stderr


def _python(version: str) -> str | None:
    """An interpreter of this version that starts: on the path, or of pyenv, whose own commands may refuse to."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for each in candidates:
        if each and subprocess.run([each, "-c", ""], check=False, capture_output=True).returncode == 0:
            return each
    return None


@pytest.mark.parametrize("version", OTHER_PYTHONS)
def test_every_supported_python_at_hand_compiles_the_wheel(version: str, wheel: Path, tmp_path: Path) -> None:
    python = _python(version)
    if python is None:
        pytest.skip(f"python{version} is not installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    _run(python, "-m", "compileall", "-q", "-f", tmp_path / "embstore")
    code = "import embstore, embstore.core.errors; print(embstore.__version__, len(dir(embstore)))"
    said = _run(python, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}")
    assert said.split() == [embstore.__version__, str(len(embstore.__all__))]
