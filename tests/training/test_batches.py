"""Batches are a function of seed and step alone."""

import pytest
import torch
from helpers.cases import make_support

from kngd_ray.training.batches import Batch, BatchSampler, Support, seeded

SHOTS = 15


@pytest.fixture(scope="module")
def support() -> Support:
    numbers = torch.arange(SHOTS, dtype=torch.float64)
    return Support(numbers[:, None], numbers.long())  # a sample's label is its number


def test_no_batch_goes_on_after_an_end(support):
    sampler = BatchSampler(support, 4, epochs=2, seed=0, prequential=True, in_order=True, ends=[6, 7, SHOTS])
    sizes = [sampler.batch(step).total for step in range(0, sampler.steps, 2)]
    assert sizes == [4, 2, 1, *[4] * ((SHOTS - 7) // 4), *([(SHOTS - 7) % 4] if (SHOTS - 7) % 4 else [])]
    assert sampler.cut_short == [6, 7]
    assert BatchSampler(support, 4, 2, 0, in_order=True, ends=[8, SHOTS]).cut_short == []
    assert [sampler.before(step) for step in range(6)] == [0, 0, 4, 4, 6, 6]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 15, 100])
def test_every_epoch_is_a_permutation(support, batch_size):
    sampler = BatchSampler(support, batch_size, epochs=3, seed=0)
    per_epoch = -(-SHOTS // batch_size)
    assert (sampler.steps_per_epoch, sampler.steps) == (per_epoch, 3 * per_epoch)
    orders = []
    for epoch in range(3):
        batches = [sampler.batch(epoch * per_epoch + i) for i in range(per_epoch)]
        assert all(batch.total <= batch_size for batch in batches)
        orders.append(torch.cat([batch.labels for batch in batches]))
        assert orders[-1].sort().values.tolist() == list(range(SHOTS))
    assert len({tuple(order.tolist()) for order in orders}) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_together_see_the_global_batch(support, world_size):
    for step in range(6):
        whole = BatchSampler(support, 7, 2, seed=1).batch(step)
        parts = [BatchSampler(support, 7, 2, seed=1).batch(step, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        for rank, part in enumerate(parts):
            assert part.total == whole.total
            assert len(part.labels) == part.sizes[rank]
            assert torch.equal(whole.labels[part.own], part.labels)


def test_steps_may_be_asked_for_in_any_order(support):
    forward = BatchSampler(support, 4, 3, seed=2)
    expected = [forward.batch(step).labels for step in range(forward.steps)]
    shuffled = BatchSampler(support, 4, 3, seed=2)
    for step in (11, 0, 7, 3, 4, 11, 1):
        assert torch.equal(shuffled.batch(step).labels, expected[step])


def test_seeds_give_different_orders(support):
    orders = {tuple(BatchSampler(support, SHOTS, 1, seed).batch(0).labels.tolist()) for seed in range(20)}
    assert len(orders) == 20


def test_no_epochs(support):
    assert BatchSampler(support, 4, 0, seed=0).steps == 0


def test_a_batch_is_a_copy(support):
    kept = support.features.clone()
    BatchSampler(support, 4, 1, seed=0).batch(0).inputs.fill_(-1)
    assert torch.equal(support.features, kept)


def test_own_part_of_an_uneven_batch():
    batch = Batch(torch.zeros(2, 1), torch.zeros(2), [3, 2, 0], 1, 0)
    assert (batch.total, batch.own) == (5, slice(3, 5))


def test_streams_differ_in_every_number():
    def first(*numbers):
        return float(torch.rand(1, generator=seeded(*numbers), dtype=torch.float64))

    streams = [first(a, b) for a in range(12) for b in range(12)] + [first(a) for a in range(12)]
    assert len(set(streams)) == len(streams)
    assert first(3, 1, 2) == first(3, 1, 2)
    assert first(2**32 - 1, 2**32 - 1) != first(2**32 - 1, 2**32 - 2)


def test_support_subset():
    support = make_support(5)
    kept = support.subset(torch.tensor([True, False, True, False, False]))
    assert len(kept) == 2
    assert torch.equal(kept.features, support.features[[0, 2]])
