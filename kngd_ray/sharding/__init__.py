"""Ownership of covariance slices, the collectives between their owners, and the sharded update."""

from kngd_ray.sharding.collectives import Group, ProcessGroup, SingleProcess
from kngd_ray.sharding.ownership import Ownership, split_evenly
from kngd_ray.sharding.sharded_filter import LocalRows, ShardedFilter, ShardedUpdate

__all__ = [
    "Group",
    "LocalRows",
    "Ownership",
    "ProcessGroup",
    "ShardedFilter",
    "ShardedUpdate",
    "SingleProcess",
    "split_evenly",
]
