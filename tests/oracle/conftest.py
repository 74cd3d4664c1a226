"""Model classes under test, each embedded once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.support.models import Case, make_case


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Cases by the name of their class."""
    root = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: make_case(name, root))
