"""Who owns what: pure arithmetic, no process group."""

from dataclasses import dataclass

import pytest
import torch
from helpers.cases import FAMILIES, rng

from kngd_ray.filters import Diagonal, Layer, Part
from kngd_ray.sharding import Ownership, split_evenly

WORLDS = [1, 2, 3, 4, 7]


@dataclass(frozen=True, kw_only=True)
class Coarse(Diagonal):
    """Variances that must stay together by four rows."""

    def grain(self, layer: Layer) -> int:
        return 4


def make_layers(seed: int) -> list[Layer]:
    """One to six layers of random shapes, some of them without factors."""
    g = rng(seed)
    shapes = torch.randint(1, 14, (int(torch.randint(1, 7, (), generator=g)), 2), generator=g).tolist()
    factored = (torch.rand(len(shapes), generator=g) < 0.7).tolist()
    return [
        Layer(f"layer{n}", o, i, factored=True) if has else Layer(f"layer{n}", o * i, 1, factored=False)
        for n, ((o, i), has) in enumerate(zip(shapes, factored, strict=True))
    ]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("total", [0, 1, 2, 3, 10, 101])
def test_split_evenly(total, world_size):
    sizes = split_evenly(total, world_size)
    assert len(sizes) == world_size
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("seed", range(6))
def test_parts_tile_the_layers_in_order_and_respect_their_grain(family, world_size, seed):
    layers = make_layers(seed)
    ownership = Ownership.balanced(FAMILIES[family], layers, world_size)
    assert ownership.world_size == world_size
    assert sum(ownership.sizes) == sum(layer.size for layer in layers)
    parts = [part for owned in ownership.parts for part in owned]
    for layer in layers:
        mine = [part for part in parts if part.layer == layer]
        assert [row for part in mine for row in range(part.start, part.stop)] == list(range(layer.o))
        assert all(part.start % FAMILIES[family].grain(layer) == 0 for part in mine)
    for rank, owned in enumerate(ownership.parts):
        assert sum(part.size for part in owned) == ownership.sizes[rank]
        assert len({part.layer.name for part in owned}) == len(owned)
    places = {layer.name: n for n, layer in enumerate(layers)}
    order = [(places[part.layer.name], part.start) for part in parts]
    assert order == sorted(order)


@pytest.mark.parametrize("family", [*FAMILIES, "coarse"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_holds_its_share_of_the_covariance_and_at_most_one_unit_more(family, world_size, seed):
    """Counted in the numbers that the tensors have, not in what the family says that they cost."""
    chosen, layers = FAMILIES.get(family, Coarse()), make_layers(seed)
    ownership = Ownership.balanced(chosen, layers, world_size)

    def numbers(parts):
        covariance = chosen.init(parts, 0.1, torch.zeros(1))
        return sum(value.numel() for state in covariance.values() for value in state.values())

    (everything,) = Ownership.balanced(chosen, layers, 1).parts
    total, held = numbers(everything), [numbers(parts) for parts in ownership.parts]
    unit = max(numbers([Part(layer, 0, min(chosen.grain(layer), layer.o))]) for layer in layers)
    assert sum(held) == total
    assert max(held) <= -(-total // world_size) + (total if chosen.joint else unit)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 101])
def test_variances_are_spread_evenly(n, world_size):
    sizes = Ownership.balanced(Diagonal(), [Layer("a", n, 1, factored=False)], world_size).sizes
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_joint_covariance_has_one_owner(world_size):
    sizes = Ownership.balanced(FAMILIES["dense"], make_layers(0), world_size).sizes
    assert sorted(sizes) == [0] * (world_size - 1) + [sum(layer.size for layer in make_layers(0))]


@pytest.mark.parametrize("world_size", WORLDS)
def test_no_layers_belong_to_nobody(world_size):
    assert Ownership.balanced(Diagonal(), [], world_size).sizes == [0] * world_size


def test_slices_tile_the_vector():
    ownership = Ownership((Layer("a", 10, 1, factored=False),), (0, 3, 3, 10))
    assert ownership.sizes == [3, 0, 7]
    assert [i for rank in range(3) for i in range(10)[ownership.slice(rank)]] == list(range(10))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((0, 14), [{"a": (0, 4), "b": (0, 1), "c": (0, 5)}]),
        ((0, 4, 14), [{"a": (0, 2)}, {"a": (2, 4), "b": (0, 1), "c": (0, 5)}]),
        ((0, 8, 9, 14), [{"a": (0, 4)}, {"b": (0, 1)}, {"c": (0, 5)}]),
        ((0, 11, 11, 14), [{"a": (0, 4), "b": (0, 1), "c": (0, 2)}, {}, {"c": (2, 5)}]),
    ],
)
def test_parts_of_bounds(bounds, expected):
    layers = (Layer("a", 4, 2, factored=True), Layer("b", 1, 1, factored=False), Layer("c", 5, 1, factored=False))
    found = [{p.layer.name: (p.start, p.stop) for p in parts} for parts in Ownership(layers, bounds).parts]
    assert found == expected
    assert [list(pieces) for pieces in found] == [list(pieces) for pieces in expected]
