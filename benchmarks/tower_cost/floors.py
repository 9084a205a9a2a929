"""Arithmetic and bytes that a step cannot do without; the formulas are in the package's docstring."""

from dataclasses import dataclass

import torch

from benchmarks.step_cost.floors import Rates, Work
from benchmarks.tower_cost.cases import FAMILIES, REFERENCE
from kngd_ray.clip import CLIPNetwork
from kngd_ray.filters import Diagonal, Factors
from kngd_ray.observations import Linearizer


@dataclass(frozen=True)
class Sizes:
    """Of a network.

    Attributes:
        n: trained weights.
        tokens: sum of T o i over its matrices.
        weights: sum of o i over its matrices.
    """

    n: int
    tokens: int
    weights: int

    @classmethod
    def of(cls, network: CLIPNetwork) -> "Sizes":
        """Found by looking at the Jacobian of one sample."""
        one = network.example(1)
        linearizer = Linearizer(network, one)
        passed = linearizer.run(one)
        H = passed.jacobian(torch.ones(1, 1, passed.logits.shape[1], device=passed.logits.device))
        tokens = weights = 0
        for layer in linearizer.layers:
            piece = H[layer.name]
            if isinstance(piece, Factors):
                tokens += piece.g.shape[2] * layer.size
                weights += layer.size
        return cls(sum(layer.size for layer in linearizer.layers), tokens, weights)


def work_of(method: str, sizes: Sizes, m: int) -> Work | None:
    """What a method must do; None where there is no formula.

    Args:
        method: its name.
        sizes: of the network.
        m: samples, of one observation each.

    Returns:
        Arithmetic and bytes.
    """
    u, v = 2 * m * sizes.tokens, m * (m + 1) * sizes.weights
    if method == REFERENCE:
        return Work(3 * u, 28 * sizes.n)
    family = FAMILIES[method]
    if not isinstance(family, Diagonal):
        return None
    update = 2 * family.samples * m * sizes.weights if family.samples else v * (family.rule == "ekf")
    return Work(4 * u + v + update, 24 * sizes.n)


__all__ = ["Rates", "Sizes", "work_of"]
