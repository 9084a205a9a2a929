"""A question put to every node of the cluster, since a path that exists on one need not exist on another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class NodeAnswer:
    """What one node said.

    Attributes:
        node: its address, with a number where several nodes share one.
        answer: what the question returned there; None if it failed.
        error: why it failed, in one line; None if it did not.
    """

    node: str
    answer: Any = None
    error: str | None = None


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
    for number, (address, reference) in enumerate(zip(addresses, asked, strict=True)):
        shared = addresses.count(address) > 1
        name = f"{address} #{addresses[: number + 1].count(address)}" if shared else address
        if reference not in ready:
            answers.append(NodeAnswer(name, error=f"no answer within {timeout_s:g} s"))
            continue
        try:
            answers.append(NodeAnswer(name, ray.get(reference, timeout=timeout_s)))
        except (RayError, GetTimeoutError) as error:
            cause = getattr(error, "cause", None) or error
            lines = str(cause).strip().splitlines() or [type(cause).__name__]
            answers.append(NodeAnswer(name, error=lines[0].rstrip(".")))
    return answers
