"""A question put to every node of the cluster, since a path that exists on one need not exist on another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kngd_ray.cluster import _ray_private
from kngd_ray.cluster.doctor.node_checks import NodeAnswer


def ask_nodes(question: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> list[NodeAnswer]:
    """Call a function once on every living node; Ray must be up.

    Args:
        question: importable on the nodes; takes no core, so that busy nodes answer too.
        *arguments: for it.
        timeout_s: seconds after which a node that has not answered counts as failed.

    Returns:
        One answer per node, that of the head first, then by address.
    """
    nodes = sorted(
        (node for node in ray.nodes() if node["Alive"]),
        key=lambda node: (
            "node:__internal_head__" not in node["Resources"],
            node["NodeManagerAddress"],
            node["NodeID"],
        ),
    )
    remote = ray.remote(num_cpus=0, max_retries=0)(question)
    asked = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            *arguments
        )
        for node in nodes
    ]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    addresses = [node["NodeManagerAddress"] for node in nodes]
    answers = []
    for number, (node, reference) in enumerate(zip(nodes, asked, strict=True)):
        address = addresses[number]
        shared = addresses.count(address) > 1
        name = f"{address} #{addresses[: number + 1].count(address)}" if shared else address
        answer, error = None, None
        if reference in ready:
            try:
                answer = ray.get(reference, timeout=timeout_s)
            except (RayError, GetTimeoutError) as failure:
                cause = getattr(failure, "cause", None) or failure
                lines = str(cause).strip().splitlines() or [type(cause).__name__]
                error = lines[0].rstrip(".")
        else:
            ray.cancel(reference, force=True)  # or it would hold a process there for as long as it hangs
            error = f"no answer within {timeout_s:g} s"
        answers.append(NodeAnswer(name, answer, error, node["Resources"]))
    return answers


@dataclass(frozen=True)
class ClusterFacts:
    """What Ray says of the cluster that was joined or started.

    Attributes:
        address: of its head.
        dashboard: host and port of its dashboard, empty without one.
        nodes: how many are alive.
        resources: what they offer together.
        most: what its autoscaler may bring up; empty without one.
    """

    address: str
    dashboard: str
    nodes: int
    resources: Mapping[str, float]
    most: Mapping[str, float]


def cluster_facts() -> ClusterFacts:
    """Describe the cluster; Ray must be up."""
    return ClusterFacts(
        ray.get_runtime_context().gcs_address,
        _ray_private.dashboard_url(),
        sum(node["Alive"] for node in ray.nodes()),
        ray.cluster_resources(),
        _ray_private.most_resources(),
    )
