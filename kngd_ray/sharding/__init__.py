"""Ownership of covariance slices, the collectives between their owners, and the sharded update."""

from kngd_ray.sharding.collectives import Group, ProcessGroup, SingleProcess
from kngd_ray.sharding.exchange import exchange
from kngd_ray.sharding.ownership import Ownership, split_evenly
from kngd_ray.sharding.sharded_filter import Observed, ShardedFilter, ShardedUpdate, covariance_bytes

__all__ = [
    "Group",
    "Observed",
    "Ownership",
    "ProcessGroup",
    "ShardedFilter",
    "ShardedUpdate",
    "SingleProcess",
    "covariance_bytes",
    "exchange",
    "split_evenly",
]
