"""Who owns what: pure arithmetic, no process group."""

from itertools import pairwise

import pytest

from kngd_ray.filters import Dense, Diagonal
from kngd_ray.sharding import Ownership, split_evenly

WORLDS = [1, 2, 3, 4, 7]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("total", [0, 1, 2, 3, 10, 101])
def test_split_evenly(total, world_size):
    sizes = split_evenly(total, world_size)
    assert len(sizes) == world_size
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 101])
def test_free_cuts_give_slices_that_differ_by_at_most_one(n, world_size):
    sizes = Ownership.balanced(Diagonal().cuts(n), world_size).sizes
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", WORLDS)
def test_an_indivisible_covariance_has_one_owner(world_size):
    sizes = Ownership.balanced(Dense().cuts(12), world_size).sizes
    assert sorted(sizes) == [0] * (world_size - 1) + [12]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("cuts", [(0, 4, 8, 12), (0, 1, 12), (0, 11, 12), (0, 5, 5, 12), (0, 3, 9, 100)])
def test_coarse_cuts(cuts, world_size):
    ownership = Ownership.balanced(cuts, world_size)
    assert ownership.world_size == world_size
    assert set(ownership.bounds) <= set(cuts)
    assert ownership.bounds[0] == 0
    assert ownership.bounds[-1] == cuts[-1]
    assert all(a <= b for a, b in pairwise(ownership.bounds))
    ideals = [cuts[-1] * rank / world_size for rank in range(world_size + 1)]
    for bound, ideal in zip(ownership.bounds, ideals, strict=True):
        assert abs(bound - ideal) == min(abs(cut - ideal) for cut in cuts)


def test_slices_tile_the_vector():
    ownership = Ownership((0, 3, 3, 10))
    assert ownership.sizes == [3, 0, 7]
    assert [i for rank in range(3) for i in range(10)[ownership.slice(rank)]] == list(range(10))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((0, 10), [{"a": (0, 4), "b": (0, 1), "c": (0, 5)}]),
        ((0, 2, 10), [{"a": (0, 2)}, {"a": (2, 4), "b": (0, 1), "c": (0, 5)}]),
        ((0, 4, 5, 10), [{"a": (0, 4)}, {"b": (0, 1)}, {"c": (0, 5)}]),
        ((0, 7, 7, 10), [{"a": (0, 4), "b": (0, 1), "c": (0, 2)}, {}, {"c": (2, 5)}]),
    ],
)
def test_pieces(bounds, expected):
    ownership = Ownership(bounds)
    found = [ownership.pieces(rank, {"a": 4, "b": 1, "c": 5}) for rank in range(ownership.world_size)]
    assert found == expected
    assert [list(pieces) for pieces in found] == [list(pieces) for pieces in expected]


def test_parameters_without_weights_belong_to_nobody():
    assert Ownership((0, 2, 3)).pieces(0, {"a": 0, "b": 3}) == {"b": (0, 2)}
