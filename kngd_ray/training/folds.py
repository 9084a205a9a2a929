"""Shots cut into folds, to be predicted by fits that have not seen them."""

import numpy as np
import torch
from torch import Tensor

from kngd_ray.training.batches import Shots, Support

ENOUGH = 256
"""Held-out shots of which more would not choose otherwise: no further fold is fitted."""


def fold_of(labels: Tensor, folds: int, twins: Tensor | None = None) -> Tensor:
    """Cut shots into folds, each class spread over them as evenly as possible.

    Args:
        labels: (N,) classes.
        folds: number of folds.
        twins: (N,) of :func:`twins_of`: copies are held out together.

    Returns:
        (N,) fold of each shot. With fewer shots than folds in a class, some folds hold out the whole
        class: it is then predicted from the prior.
    """
    if twins is not None:
        different, place = twins.unique(return_inverse=True)
        return fold_of(labels[different], folds)[place]
    order = labels.argsort(stable=True)
    ordered = labels[order]
    members = torch.arange(len(labels), device=labels.device)
    turn = torch.empty_like(labels)
    turn[order] = members - torch.searchsorted(ordered, ordered)  # number of each shot in its class
    # offset by class, so that single-shot classes do not all leave together
    return (turn + labels) % folds


def twins_of(shots: Shots) -> Tensor | None:
    """Which shots are copies of one another: a fit that has seen one knows the other.

    Args:
        shots: N, of features; those of pictures are drawn without copies.

    Returns:
        (N,) number of the first shot with the same features; None where all differ.
    """
    if not isinstance(shots, Support) or not len(shots):
        return None
    rows = np.ascontiguousarray(shots.features.cpu().numpy())
    whole = rows.view(np.dtype((np.void, rows.strides[0]))).ravel()
    _, first, place = np.unique(whole, return_index=True, return_inverse=True)
    return None if len(first) == len(rows) else torch.from_numpy(first[place]).to(shots.labels.device)


def single(labels: Tensor, twins: Tensor | None = None) -> bool:
    """Whether no class has two shots.

    Args:
        labels: (N,) classes.
        twins: (N,) of :func:`twins_of`: copies are one shot.

    Returns:
        Whether a fold lacks the classes of its shots altogether.
    """
    return int((labels if twins is None else labels[twins.unique()]).bincount().max()) < 2
