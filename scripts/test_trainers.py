"""Run embstore with trainers of other versions than the development environment has, or that are not in it at all.

    python -m scripts.test_trainers [NAME ...] [--report FILE]

``tests/trainers/environments.toml`` lists the environments. Each lies in ``.venv-trainers/NAME``: its own packages come
first, those of the environment that runs this script after them, so that torch is not installed ten times. An environment is
made again only if its entry changes. What the tests prove is merged into the report, of which the pages of ``docs/train/``
are made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-trainers"
LIST = ROOT / "tests" / "trainers" / "environments.toml"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An entry of the list: what pip installs, with and without dependencies, and the tests that run there."""

    name: str
    tests: list[str]
    requirements: list[str] = field(default_factory=list)
    without_dependencies: list[str] = field(default_factory=list)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return FOLDER / self.name / "bin" / "python"

    def make(self) -> None:
        """Create the environment, unless it is there with these packages."""
        done = FOLDER / self.name / "installed.json"
        wanted = json.dumps([self.requirements, self.without_dependencies])
        if done.exists() and done.read_text(encoding="utf-8") == wanted:
            return
        print(f"{self.name}: installing {' '.join(self.requirements + self.without_dependencies)}", flush=True)
        shutil.rmtree(FOLDER / self.name, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(FOLDER / self.name)], check=True)
        ours = sysconfig.get_path("purelib")
        theirs = sysconfig.get_path("purelib", vars={"base": str(FOLDER / self.name), "platbase": str(FOLDER / self.name)})
        # read after the environment's own packages, which therefore win; editable installs of ours are found as well
        (Path(theirs) / "zzz_development_packages.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        # whatever a package asks for: torch stays the one that is there, without CUDA
        constraints = FOLDER / self.name / "constraints.txt"
        constraints.write_text(f"torch=={version('torch').partition('+')[0]}\n", encoding="utf-8")
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if self.requirements:
            subprocess.run([*pip, "--constraint", str(constraints), *self.requirements], check=True)
        if self.without_dependencies:
            subprocess.run([*pip, "--no-deps", *self.without_dependencies], check=True)
        done.write_text(wanted, encoding="utf-8")

    def test(self, report: Path) -> bool:
        """Run its tests; whether all passed."""
        print(f"{self.name}:", flush=True)
        done = subprocess.run(
            [str(self.python), "-m", "pytest", "-q", "-m", "", "--trainer-report", str(report), *self.tests],
            check=False,
            cwd=ROOT,
        )
        return done.returncode == 0


def environments() -> list[Environment]:
    """All entries of the list, in its order."""
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))
    return [Environment(name=name, **entry) for name, entry in entries.items()]


def main() -> int:
    """Make the environments, run their tests, write the report if all of them ran and passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="environments to run; default: all")
    parser.add_argument("--report", type=Path, help="file to write, if everything passed")
    options = parser.parse_args()
    known = {each.name: each for each in environments()}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"there is no environment {', '.join(unknown)}; there are {', '.join(known)}")
    FOLDER.mkdir(exist_ok=True)
    found, failed = [], []
    for name in options.names or known:
        part = FOLDER / f"{name}.json"
        part.unlink(missing_ok=True)
        known[name].make()
        if not known[name].test(part):
            failed.append(name)
        elif part.exists():
            found += json.loads(part.read_text(encoding="utf-8"))["evidence"]
    if failed:
        print(f"failed in {', '.join(failed)}", file=sys.stderr)
        return 1
    if options.report:
        kept = []
        if options.names and options.report.exists():  # only some ran: the others' results stay
            again = {(each["trainer"], each["version"], each["what"]) for each in found}
            old = json.loads(options.report.read_text(encoding="utf-8"))["evidence"]
            kept = [each for each in old if (each["trainer"], each["version"], each["what"]) not in again]
        rows = sorted(kept + found, key=lambda each: (each["trainer"], each["version"], each["what"]))
        options.report.write_text(json.dumps({"evidence": rows}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
