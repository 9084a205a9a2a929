r"""Steps on many ranks of a network that is not there: bytes counted by the project's own rules, times by a model.

Who owns what, and whether a layer travels as factors or as rows, is what :mod:`kngd_ray.sharding` decides for so many
ranks; nothing is run. With W ranks of m samples each, M = W m, and ``all`` standing for a sum over layers ::

    forward, backward    2 u of the own m samples                                  the same for any W
    rows of H            twice u: of all M samples, but the own n / W weights       the same for any W
    S = H P H^T          2 M (M + 1) all o i / W, as torch does it                  grows with W, as M does
    exchange             all_to_all of H, for each layer in both passes             bytes grow to 2 m all T (o + i)
    S                    all_reduce of M^2 numbers; its Cholesky, M^3 / 3, on every rank
    theta                a broadcast from each rank, n numbers in all
    AdamW                3 u, and an all_reduce of n gradients

A collective takes its steps' latency, ``log2 W`` of a tree or W of messages to all, and its bytes at the rate of one
link. Nothing overlaps: what a rank computes meanwhile would hide some of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log2
from typing import Any

import torch

from benchmarks.tower_cost.cases import Case
from benchmarks.tower_cost.floors import Sizes
from kngd_ray.filters import Diagonal, Factors, Jacobian, Rows
from kngd_ray.observations import Linearizer
from kngd_ray.sharding import Ownership
from kngd_ray.sharding import streamed as streaming
from kngd_ray.sharding.exchange import _form

_NUMBER = 4  # bytes, float32
_CHOLESKY = 1 / 3  # of M^3 multiply-adds, two FLOPs each


@dataclass(frozen=True)
class Link:
    """What ranks and the network between them do; assumptions, not measurements.

    Attributes:
        flops: of a rank, per second, in large products.
        bytes: that a rank receives per second.
        latency: seconds of a message.
    """

    flops: float = 60e12
    bytes: float = 25e9
    latency: float = 20e-6

    def moved(self, bytes_: float, messages: float) -> float:
        """Seconds of a collective."""
        return bytes_ / self.bytes + messages * self.latency


@dataclass(frozen=True)
class Step:
    """A step of a rank.

    Attributes:
        ranks: W.
        M: observations of the global batch.
        held: bytes of P on the rank that has most.
        factors: bytes of H that it receives, in both passes.
        moved: bytes that it receives in all.
        work: FLOPs of it that grow with M: rows of H, and what is factored on every rank.
        seconds: of the filter.
        adamw: of AdamW on as many ranks.
    """

    ranks: int
    M: int
    held: float
    factors: float
    moved: float
    work: float
    seconds: float
    adamw: float


def jacobian_of(case: Case) -> tuple[Linearizer, Jacobian, Sizes]:
    """The layers of a network and the form of their Jacobian, from one sample."""
    network = case.network()
    one, linearizer = network.example(1), Linearizer(network, network.example(1))
    passed = linearizer.run(one)
    H = passed.jacobian(torch.ones(1, 1, passed.logits.shape[1], device=passed.logits.device))
    return linearizer, H, Sizes.of(network)


def received(ownership: Ownership, H: Mapping[str, Factors | Rows], samples: Sequence[int], rank: int) -> int:
    """Bytes of H that a rank receives in both passes of a step, one observation of each sample.

    Args:
        ownership: who owns what.
        H: of one sample, every layer.
        samples: on each rank.
        rank: which one.

    Returns:
        Bytes, of float32.
    """
    M, elsewhere, budget, numbers = sum(samples), sum(samples) - samples[rank], streaming._KEPT, 0
    own = {part.layer.name: _form(part, 1, H[part.layer.name], Diagonal().reach) for part in ownership.parts[rank]}
    for layers in streaming._rounds(ownership.layers, M):
        rows = M * sum(layer.size for layer in layers)
        kept = rows <= budget
        budget -= rows if kept else 0
        numbers += (1 if kept else 2) * sum(own[x.name].numbers for x in layers if x.name in own)
    return elsewhere * numbers * _NUMBER


def steps_of(case: Case, worlds: Sequence[int], link: Link, *, each: bool = True) -> list[Step]:
    """A step of ``vdekf`` on each number of ranks.

    Args:
        case: network and batch.
        worlds: numbers of ranks.
        link: what they do.
        each: whether the batch is that of a rank, or else of all together.

    Returns:
        The rank that receives most, of each.
    """
    linearizer, H, sizes = jacobian_of(case)
    forms = {layer.name: H[layer.name] for layer in linearizer.layers}
    found = []
    for W in worlds:
        M = case.m * W if each else case.m
        ownership = Ownership.balanced(Diagonal(), linearizer.layers, W)
        samples = [M // W + (r < M % W) for r in range(W)]
        looked_at = range(W) if W <= 16 else range(0, W, W // 16)
        factors = max(received(ownership, forms, samples, rank) for rank in looked_at)
        share = max(ownership.sizes)
        ring = (W - 1) / W
        S, theta = 2 * ring * M * M * _NUMBER, ring * sizes.n * _NUMBER
        passes = 2 * M * (M + 1) * sizes.weights * share / sizes.n
        solved = 2 * _CHOLESKY * M**3
        u = 2 * max(samples) * sizes.tokens
        collectives = 2 * len(list(streaming._rounds(ownership.layers, M)))
        waiting = 0.0
        if W > 1:
            waiting = link.moved(factors, collectives * (W - 1)) + link.moved(S, 2 * log2(W))
            waiting += link.moved(theta, W * log2(W))
        gradients = link.moved(2 * ring * sizes.n * _NUMBER, 2 * log2(W)) if W > 1 else 0.0
        seconds = (2 * u + passes + 2 * u + solved) / link.flops + waiting
        found.append(
            Step(
                W,
                M,
                share * _NUMBER,
                factors,
                factors + S + theta,
                passes + solved,
                seconds,
                3 * u / link.flops + gradients,
            )
        )
    return found


def table(case: Case, worlds: Sequence[int], link: Link) -> str:
    """What :func:`steps_of` finds, batches of a rank and of all, as Markdown."""
    head = [
        "ranks",
        "M",
        "P of a rank, MB",
        "H received, MB",
        "moved in all, MB",
        "rows and solve, GFLOP",
        "s",
        "x AdamW",
    ]
    blocks = [
        f"**{case.model}**, vdekf, simulated: {link.flops / 1e12:g} TFLOP/s, {link.bytes / 1e9:g} GB/s, "
        f"{link.latency * 1e6:g} us a message; float32"
    ]
    for each in (True, False):
        chosen = worlds if each else [W for W in worlds if case.m * 32 >= W]
        one = case if each else Case(case.model, case.m * 32, case.precision, case.device)
        rows = [_cells(step) for step in steps_of(one, chosen, link, each=each)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
        blocks.append("\n".join([f"{one.m} samples {'on each rank' if each else 'in all'}", "", *lines]))
    return "\n\n".join(blocks)


def _cells(step: Step) -> list[str]:
    found: dict[str, Any] = asdict(step)
    megabytes = [f"{found[key] / 1e6:,.1f}" for key in ("held", "factors", "moved")]
    times = [f"{step.work / 1e9:,.0f}", f"{step.seconds:.3g}", f"{step.seconds / step.adamw:.2f}"]
    return [str(step.ranks), f"{step.M:,}", *megabytes, *times]
