"""The layout of the package: one folder a layer, one name a module, no folder in the way of a public function."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

import embstore
import embstore.training

PACKAGE = Path(embstore.__file__).parent
MODULES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def test_nothing_lies_at_the_root_but_the_package_itself() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("package", [embstore, embstore.training], ids=lambda package: package.__name__)
def test_no_folder_or_module_bears_a_public_name(package: object) -> None:
    """Importing ``embstore.build.x`` would put the folder in the place of the function ``embstore.build``."""
    folder = Path(package.__file__).parent  # type: ignore[attr-defined]
    names = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not names & set(package.__all__)  # type: ignore[attr-defined]


def test_no_two_modules_share_a_name() -> None:
    """Those of ``cli`` are excepted: each is called as its command is; so is what a trainer's configuration names."""
    homes = defaultdict(list)
    for module in MODULES:
        if module.parts[0] not in ("cli", "integrations"):
            homes[module.stem].append(str(module))
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_modules_of_the_command_line_are_commands_or_have_a_name_of_their_own() -> None:
    from embstore.cli import app

    commands = {command.callback.__module__.rpartition(".")[2] for command in app.registered_commands if command.callback}
    shared = {module.stem for module in MODULES if module.parts[0] == "cli"} - commands
    assert not shared & {module.stem for module in MODULES if module.parts[0] != "cli"}


def test_folders_are_the_layers() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    layers = {"cli", "views", "flow", "model", "search", "storage", "engines", "host", "core"}
    assert folders == layers | {"training", "integrations"}
