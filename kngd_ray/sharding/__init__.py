"""Ownership of covariance slices, the collectives between their owners, and the sharded update."""

from kngd_ray.sharding.collectives import Group, ProcessGroup, SingleProcess
from kngd_ray.sharding.exchange import exchange
from kngd_ray.sharding.ownership import Ownership, split_evenly
from kngd_ray.sharding.partitioned import Observed, PartitionedFilter, StreamedOutcome
from kngd_ray.sharding.sharded_filter import ShardedFilter, ShardedUpdate, covariance_bytes
from kngd_ray.sharding.streamed import StreamedFilter

__all__ = [
    "Group",
    "Observed",
    "Ownership",
    "PartitionedFilter",
    "ProcessGroup",
    "ShardedFilter",
    "ShardedUpdate",
    "SingleProcess",
    "StreamedFilter",
    "StreamedOutcome",
    "covariance_bytes",
    "exchange",
    "split_evenly",
]
