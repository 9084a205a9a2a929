"""Batches on their way into a fit: features from memory, pictures from their file, decoded ahead."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil, inf
from pathlib import Path

from kngd_ray.clip import CLIPNetwork, Head, augmentation_of
from kngd_ray.sharding import Group
from kngd_ray.training.batches import Batch, BatchSampler, Support
from kngd_ray.training.decoding import Prefetcher
from kngd_ray.training.pictures import Pictures, Sample, augmentation

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "microseconds period" of CPU time, or "max period"
_THREADS = 16  # more do not decode faster: the rest of a picture's way is one thread's


@contextmanager
def batches(sampler: BatchSampler, head: Head, group: Group, start: int) -> Iterator[Iterator[Batch]]:
    """This rank's batches of a fit.

    Args:
        sampler: the batches; its shots on the device, as far as they are in memory.
        head: what they go into, and where.
        group: the ranks.
        start: steps that were done before.

    Yields:
        An iterator over the batches of the steps that are left.
    """
    steps = range(start, sampler.steps)
    rank, world_size, shots = group.rank, group.world_size, sampler.support
    if not isinstance(head, CLIPNetwork):
        yield (sampler.batch(step, rank, world_size) for step in steps)
        return
    if isinstance(shots, Support):  # the image tower is frozen
        for_text = (sampler.batch(step, rank, world_size) for step in steps)
        yield (replace(batch, inputs=head.inputs(batch.labels, feature=batch.inputs)) for batch in for_text)
        return
    assert isinstance(shots, Pictures)

    def plan(step: int) -> list[Sample]:
        chosen = sampler.chosen(step, rank, world_size)
        return [(i, augmentation(sampler.seed, chosen.turn, i)) for i in chosen.local.tolist()]

    crop = augmentation_of(head.preprocess_cfg, head.options)
    with Prefetcher(
        shots,
        plan,
        steps,
        head.pictures.decoded,
        augment=None if crop is None else crop.crop,
        threads=decoding_threads(world_size),
    ) as pixels:

        def decoded() -> Iterator[Batch]:
            for step, images in zip(steps, pixels, strict=True):
                chosen = sampler.chosen(step, rank, world_size)
                labels = shots.labels[chosen.local.to(shots.labels.device)]
                yield chosen.batch(head.inputs(labels, image=head.received(images)), labels)

        yield decoded()


def decoding_threads(world_size: int = 1) -> int:
    """How many pictures a rank decodes at once: its share of the cores, if all ranks were on this machine."""
    return max(2, min(_THREADS, cores() // world_size))


def cores() -> int:
    """CPU cores that this process may use, by its affinity and by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    allowed = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, ceil(min(allowed, _quota())))


def _quota() -> float:
    """Cores' worth of time that a container with a limit has, as its control group (version 2) says; else infinity."""
    try:
        microseconds, period = _QUOTA.read_text().split()
        return int(microseconds) / int(period)
    except (OSError, ValueError):  # there is no control group, or no limit: "max"
        return inf
