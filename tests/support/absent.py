"""Stand-ins for packages that a trainer imports and a test does not use: kernels, engines, servers of a GPU node.

Only modules of the named packages that cannot be imported are stood in for. Every name in one is a class that takes any
arguments and does nothing, so that a trainer's modules can be imported, subclassed and decorated.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Nothing(type):
    """A class whose attributes, results and instances are classes of the same kind."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)

    def __call__(cls, *given: Any, **options: Any) -> Any:
        # as a decorator it gives back what it decorates
        return given[0] if len(given) == 1 and not options and callable(given[0]) else _nothing(cls.__name__)


def _nothing(name: str) -> Any:
    return _Nothing(name, (), {})


class _Module(ModuleType):
    __path__ = ()  # type: ignore[assignment]  # a package without files
    __version__ = "999.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _nothing(name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Import with stand-ins for those of ``packages`` that are not installed."""
    finder = _Finder([name for name in packages if importlib.util.find_spec(name) is None])
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
