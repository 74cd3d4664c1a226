"""A backbone cut into units: what lies in lists, what is shared, what is only looked up, and what always stays."""

from __future__ import annotations

import torch
from torch import nn

from embstore.model.units import Parts, parts_of


class Block(nn.Module):
    """A layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.inner(given) * self.gain


class Backbone(nn.Module):
    """Whatever is given, by name."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


BLOCK = {"inner.weight", "inner.bias", "gain"}


def names_of(parts: Parts) -> list[tuple[str, set[str]]]:
    return [(unit.name, {place.full_name.removeprefix(f"{unit.name}.") for place in unit.places}) for unit in parts.units]


def check_every_parameter(backbone: nn.Module, parts: Parts, prefix: str = "") -> None:
    """Each place of a parameter is in exactly one part, with its name in the model, and units share none."""
    every = [*parts.tables, *parts.base, *(place for unit in parts.units for place in unit.places)]
    expected = {f"{prefix}{name}": each for name, each in backbone.named_parameters(remove_duplicate=False)}
    found = {place.full_name: place.stored for place in every}
    assert len(found) == len(every)
    assert set(found.values()) == set(expected.values())
    assert all(expected[name] is stored for name, stored in found.items())
    owners = [{id(place.stored) for place in unit.places} for unit in parts.units]
    owners.append({id(place.stored) for place in (*parts.tables, *parts.base)})
    assert sum(map(len, owners)) == len(set.union(*owners))
    for place in every:
        assert place.module._parameters[place.name] is place.stored


def test_layers_of_any_list_are_units_and_the_rest_stays() -> None:
    backbone = Backbone(
        embed=nn.Embedding(4, 2),
        first=nn.Linear(2, 2),
        layers=nn.ModuleList([Block(), Block()]),
        deep=Backbone(h=nn.ModuleList([Block()]), norm=nn.LayerNorm(2)),
        stack=nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
    )
    parts = parts_of(backbone, "model.")
    assert names_of(parts) == [("model.layers.0", BLOCK), ("model.layers.1", BLOCK), ("model.deep.h.0", BLOCK)]
    assert [unit.number for unit in parts.units] == [0, 1, 2]
    assert [unit.gates for unit in parts.units] == [(each,) for each in (*backbone.layers, backbone.deep.h[0])]
    assert [place.full_name for place in parts.tables] == ["model.embed.weight"]
    assert {place.full_name for place in parts.base} == {
        f"model.{name}.{own}" for name in ("first", "deep.norm", "stack.0") for own in ("weight", "bias")
    }
    check_every_parameter(backbone, parts, "model.")


def test_lists_in_lists_and_containers_are_opened_down_to_what_is_called() -> None:
    backbone = Backbone(
        groups=nn.ModuleList(
            [
                nn.ModuleList([Block(), Block()]),
                nn.ModuleDict({"attention": Block(), "more": nn.ModuleList([Block()])}),
                nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            ]
        ),
        table=nn.ModuleDict({"h": nn.ModuleList([Block()]), "norm": nn.LayerNorm(2)}),
    )
    parts = parts_of(backbone, "")
    assert [unit.name for unit in parts.units] == [
        "groups.0.0", "groups.0.1", "groups.1.attention", "groups.1.more.0", "groups.2", "table.h.0",
    ]  # fmt: skip
    assert {place.full_name for place in parts.base} == {"table.norm.weight", "table.norm.bias"}
    check_every_parameter(backbone, parts)


def test_a_layer_with_layers_in_it_is_one_unit() -> None:
    layer = Block()
    layer.experts = nn.ModuleList([Block(), Block()])
    backbone = Backbone(layers=nn.ModuleList([layer]))
    parts = parts_of(backbone, "")
    assert names_of(parts) == [("layers.0", BLOCK | {f"experts.{number}.{name}" for number in (0, 1) for name in BLOCK})]
    assert parts.units[0].gates == (layer,)
    check_every_parameter(backbone, parts)


def test_layers_that_share_a_tensor_are_one_unit() -> None:
    blocks = [Block() for _ in range(6)]
    blocks[4].inner.weight = blocks[1].inner.weight
    blocks[2].gain = blocks[4].gain  # by way of another one
    backbone = Backbone(layers=nn.ModuleList(blocks))
    parts = parts_of(backbone, "")
    assert [unit.gates for unit in parts.units] == [
        (blocks[0],), (blocks[1], blocks[2], blocks[4]), (blocks[3],), (blocks[5],),
    ]  # fmt: skip
    assert len(parts.units[1].places) == 9
    check_every_parameter(backbone, parts)


def test_one_module_in_two_lists_is_one_gate() -> None:
    shared, other = Block(), Block()
    backbone = Backbone(layers=nn.ModuleList([shared, other, shared]), again=nn.ModuleList([other, shared]))
    parts = parts_of(backbone, "")
    assert [unit.gates for unit in parts.units] == [(shared,), (other,)]
    assert [len(unit.places) for unit in parts.units] == [3, 3]


def test_a_shared_block_inside_layers_makes_them_one_unit() -> None:
    """As in Zamba2: the block is not in the list itself."""
    blocks, shared = [Block() for _ in range(3)], Block()
    blocks[0].shared = blocks[2].shared = shared
    parts = parts_of(Backbone(layers=nn.ModuleList(blocks)), "")
    assert [unit.gates for unit in parts.units] == [(blocks[0], blocks[2]), (blocks[1],)]
    assert len(parts.units[0].places) == 9  # the shared block's once


def test_what_a_layer_shares_with_the_outside_always_stays_in_all_its_places() -> None:
    block = Block()
    backbone = Backbone(embed=nn.Embedding(2, 2), norm=nn.Linear(2, 2), layers=nn.ModuleList([block]))
    backbone.norm.bias = block.inner.bias
    block.inner.weight = backbone.embed.weight
    parts = parts_of(backbone, "")
    assert names_of(parts) == [("layers.0", {"gain"})]
    assert [place.full_name for place in parts.tables] == ["embed.weight"]
    assert {place.full_name for place in parts.base} == {
        "norm.weight", "norm.bias", "layers.0.inner.bias", "layers.0.inner.weight",
    }  # fmt: skip
    check_every_parameter(backbone, parts)


def test_lists_without_weights_are_no_units() -> None:
    backbone = Backbone(layers=nn.ModuleList([nn.Identity(), nn.ReLU()]), out=nn.Linear(2, 2))
    parts = parts_of(backbone, "")
    assert parts.units == ()
    check_every_parameter(backbone, parts)
    assert parts_of(nn.Linear(2, 2), "").units == ()
