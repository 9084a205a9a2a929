"""Shots cut into folds, to be predicted by fits that have not seen them."""

import torch
from torch import Tensor

ENOUGH = 256
"""Held-out shots of which more would not choose otherwise: no further fold is fitted."""


def fold_of(labels: Tensor, folds: int) -> Tensor:
    """Cut shots into folds, each class spread over them as evenly as possible.

    Args:
        labels: (N,) classes.
        folds: number of folds.

    Returns:
        (N,) fold of each shot. With fewer shots than folds in a class, some folds hold out the whole
        class: it is then predicted from the prior.
    """
    order = labels.argsort(stable=True)
    ordered = labels[order]
    members = torch.arange(len(labels), device=labels.device)
    turn = torch.empty_like(labels)
    turn[order] = members - torch.searchsorted(ordered, ordered)  # number of each shot in its class
    # offset by class, so that single-shot classes do not all leave together
    return (turn + labels) % folds


def single(labels: Tensor) -> bool:
    """Whether no class has two shots.

    Args:
        labels: (N,) classes.

    Returns:
        Whether a fold lacks the classes of its shots altogether.
    """
    return int(labels.bincount().max()) < 2
