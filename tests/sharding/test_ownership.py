"""Who owns what: pure arithmetic, no process group."""

from dataclasses import dataclass
from itertools import product

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


def test_split_evenly(subtests):
    for total, world_size in product([0, 1, 2, 3, 10, 101], WORLDS):
        with subtests.test(total=total, world_size=world_size):
            sizes = split_evenly(total, world_size)
            assert len(sizes) == world_size
            assert sum(sizes) == total
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)


def test_parts_tile_the_layers_in_order_and_respect_their_grain(subtests):
    for family, world_size, seed in product(FAMILIES, WORLDS, range(6)):
        with subtests.test(family=family, world_size=world_size, seed=seed):
            check_that_parts_tile(family, make_layers(seed), world_size)


def check_that_parts_tile(family, layers, world_size):
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


def test_a_rank_holds_its_share_of_the_covariance_and_at_most_one_unit_more(subtests):
    for family, world_size, seed in product([*FAMILIES, "coarse"], [1, 2, 3, 4], range(20)):
        with subtests.test(family=family, world_size=world_size, seed=seed):
            check_shares(FAMILIES.get(family, Coarse()), make_layers(seed), world_size)


def check_shares(chosen, layers, world_size):
    """Counted in the numbers that the tensors have, not in what the family says that they cost."""
    ownership = Ownership.balanced(chosen, layers, world_size)

    def numbers(parts):
        covariance = chosen.init(parts, 0.1, torch.zeros(1))
        return sum(value.numel() for state in covariance.values() for value in state.values())

    (everything,) = Ownership.balanced(chosen, layers, 1).parts
    total, held = numbers(everything), [numbers(parts) for parts in ownership.parts]
    unit = max(numbers([Part(layer, 0, min(chosen.grain(layer), layer.o))]) for layer in layers)
    assert sum(held) == total
    assert max(held) <= -(-total // world_size) + (total if chosen.joint else unit)


def test_variances_are_spread_evenly(subtests):
    for n, world_size in product([1, 2, 3, 10, 101], WORLDS):
        with subtests.test(n=n, world_size=world_size):
            sizes = Ownership.balanced(Diagonal(), [Layer("a", n, 1, factored=False)], world_size).sizes
            assert sum(sizes) == n
            assert max(sizes) - min(sizes) <= 1


def test_a_joint_covariance_has_one_owner(subtests):
    for world_size in WORLDS:
        with subtests.test(world_size=world_size):
            sizes = Ownership.balanced(FAMILIES["dense"], make_layers(0), world_size).sizes
            assert sorted(sizes) == [0] * (world_size - 1) + [sum(layer.size for layer in make_layers(0))]


def test_no_layers_belong_to_nobody():
    found = [Ownership.balanced(Diagonal(), [], world_size).sizes for world_size in WORLDS]
    assert found == [[0] * world_size for world_size in WORLDS]


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
