"""The backbone cut into units of weights: layers that batches pass one after the other, so few need lie in memory together.

A unit is a module that lies in a list of the backbone (``layers.7``), whatever the list is called; nothing is assumed about
the order in which units run, how often, or whether at all. Modules that share a stored tensor are one unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Place:
    """Where a stored parameter belongs: ``module.name``, with its full name in the model for messages."""

    module: nn.Module
    name: str
    full_name: str
    stored: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Unit:
    """Weights that are made and dropped together; a batch waits when it calls one of ``gates``."""

    number: int
    name: str
    gates: tuple[nn.Module, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parts:
    """A backbone's parameters: those of units, embedding tables that are only looked up, and the few that always stay."""

    units: tuple[Unit, ...]
    tables: tuple[Place, ...]
    base: tuple[Place, ...]


def parts_of(backbone: nn.Module, prefix: str) -> Parts:
    """Sort the parameters of a loaded backbone; ``prefix`` goes in front of their names."""
    named: dict[nn.Module, str] = {}  # a module that lies in two lists is one gate
    for name, gate in _gates(backbone, prefix):
        named.setdefault(gate, name)
    gates = [(name, gate) for gate, name in named.items()]
    owner: dict[int, int] = {}  # the memory of a parameter -> its unit
    group = list(range(len(gates)))  # gates that share a tensor end in one group

    def root(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    places_of: list[list[Place]] = []
    for index, (name, gate) in enumerate(gates):
        places_of.append(_places(gate, name))
        for place in places_of[index]:
            first = owner.setdefault(id(place.stored), index)
            group[root(index)] = root(first)
    inside = {module for _, gate in gates for module in gate.modules()}
    everywhere = _places(backbone, prefix.rstrip("."))
    resident = {id(place.stored) for place in everywhere if place.module not in inside}
    outside = [place for place in everywhere if id(place.stored) in resident]  # also where a unit shares it
    units: list[Unit] = []
    for first in sorted({root(index) for index in range(len(gates))}):
        members = [index for index in range(len(gates)) if root(index) == first]
        places = {(id(place.module), place.name): place for index in members for place in places_of[index]}
        units.append(
            Unit(
                number=len(units),
                name=gates[first][0],
                gates=tuple(gates[index][1] for index in members),
                places=tuple(place for place in places.values() if id(place.stored) not in resident),
            )
        )
    is_table = {id(place): isinstance(place.module, nn.Embedding) and place.name == "weight" for place in outside}
    return Parts(
        units=tuple(unit for unit in units if unit.places),
        tables=tuple(place for place in outside if is_table[id(place)]),
        base=tuple(place for place in outside if not is_table[id(place)]),
    )


def _gates(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that lie in a list and have their own forward."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _elements(child, f"{prefix}{name}.")
        else:
            yield from _gates(child, f"{prefix}{name}.")


def _elements(container: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in container.named_children():
        if type(child).forward is nn.Module.forward:  # a container: never called itself
            yield from _elements(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _places(module: nn.Module, name: str) -> list[Place]:
    """Every parameter of a module and its children, also those that are shared."""
    return [
        Place(module=owner, name=own, full_name=f"{name}.{path}.{own}".replace("..", ".").strip("."), stored=stored)
        for path, owner in module.named_modules()
        for own, stored in owner._parameters.items()
        if stored is not None
    ]
