"""What `benchmarks.tower_cost` counts on paper is what ranks receive."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.tower_cost import network
from kngd_ray.filters import Diagonal, Factors, Layer, Rows, Transition
from kngd_ray.sharding import Observed, Ownership, StreamedFilter
from kngd_ray.sharding import streamed as streaming

LAYERS = [
    Layer("wide", 30, 20, factored=True),
    Layer("tokens", 12, 10, factored=True),
    Layer("bias", 30, 1, factored=False),
    Layer("last", 8, 40, factored=True),
]
TOKENS = {"wide": 2, "tokens": 60, "last": 1}


class Alone:
    """One of several ranks, the others of which send zeros."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.bytes_moved = rank, world_size, 0

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_rows(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        raise AssertionError("a step of the filter gathers nothing")

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        self.bytes_moved += (sum(incoming) - incoming[self.rank]) * outgoing[0].element_size()
        return [outgoing[r] if r == self.rank else outgoing[0].new_zeros(size) for r, size in enumerate(incoming)]

    def spread_slices(self, whole: Tensor, bounds: Sequence[int]) -> None:
        pass


def pieces(m: int) -> dict[str, Factors | Rows]:
    torch.manual_seed(0)
    return {
        x.name: Factors(torch.randn(m, 1, TOKENS[x.name], x.o), torch.randn(m, TOKENS[x.name], x.i))
        if x.factored
        else Rows(torch.randn(m, x.size))
        for x in LAYERS
    }


@pytest.mark.parametrize("kept", [0, 5000, 1 << 22])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_bytes_on_paper_are_those_received(world_size, kept, monkeypatch):
    monkeypatch.setattr(streaming, "_KEPT", kept)
    monkeypatch.setattr(streaming, "_TOGETHER", 1000)
    family = Diagonal(rule="vdekf")
    samples = [3] * (world_size - 1) + [2]
    ownership = Ownership.balanced(family, LAYERS, world_size)
    for rank in range(world_size):
        group = Alone(rank, world_size)
        filter = StreamedFilter(family, LAYERS, group)
        belief = filter.init(torch.zeros(sum(x.size for x in LAYERS)), 0.1)
        observed = Observed(pieces(samples[rank]), torch.ones(sum(samples)), None, samples, 1)
        filter.update(belief, Transition(1.0, 1.0, 0.0), observed)
        assert network.received(ownership, pieces(1), samples, rank) == group.bytes_moved


def test_what_a_step_costs_with_the_number_of_ranks():
    """P is shared out, work grows with the batch of all, and a batch of one size costs each rank less."""
    case = network.Case("small-vit", 32, "float32", "cpu")
    one, eight = network.steps_of(case, [1, 8], network.Link())
    assert one.moved == 0
    assert one.held == pytest.approx(8 * eight.held, rel=0.01)
    assert eight.M == 8 * one.M
    assert eight.work > 6 * one.work
    assert network.steps_of(case, [8], network.Link(), each=False)[0].work < 0.2 * one.work
