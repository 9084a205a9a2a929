"""The head that a fit of towers starts from: fitted on pictures and crops of them, and by folds on parts of them."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import calibration_of
from kngd_ray.training.fit import FitTask, fit, head_task
from kngd_ray.training.folds import fold_of, single
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.method import Method, MethodState
from kngd_ray.training.start import HeldOut
from kngd_ray.training.views import with_views

_FOLDS = 4


def _with_views(task: FitTask, crops: Tensor | None) -> FitTask:
    """A head's fit, its prior decided, on its pictures and crops (V, N, d) of them."""
    if crops is None:
        return task
    assert isinstance(task.support, Support)
    options, support = with_views(task.options, task.support, crops)
    return replace(task, options=options, support=support)


def _without_a_fold(
    task: FitTask, crops: Tensor | None, device: torch.device | str
) -> Iterator[tuple[Tensor, Method, Support]]:
    """Heads that have not seen some of the shots.

    Args:
        task: the head's fit on pictures as they are, its prior decided.
        crops: (V, N, d) of its pictures; None without.
        device: where to compute.

    Yields:
        (N,) which shots a head has not seen, the head, and these shots; nothing of shots whose classes it would lack.
    """
    shots = task.to(device).support
    assert isinstance(shots, Support)
    if single(shots.labels) or len(shots) < _FOLDS:
        return
    fold = fold_of(shots.labels, _FOLDS)
    for f in range(_FOLDS):
        held = fold == f
        if not bool(held.any()):
            continue
        part = task.part((~held).to(task.support.labels.device))
        part = _with_views(part, None if crops is None else crops[:, (~held).to(crops.device)])
        yield held, fit(part, device=device), shots.subset(held)


def fitted_head(task: FitTask, crops: Tensor | None, device: torch.device | str) -> tuple[MethodState, HeldOut | None]:
    """The head that towers start from, and for the filter what heads without a shot say of it.

    Args:
        task: of towers.
        crops: (V, N, d) of its pictures; None without.
        device: where to compute.

    Returns:
        What came of the head's fit; and of shots that were held out, if any were.
    """
    first = head_task(task)
    alone = fit(first, device=device)
    assert isinstance(alone, KalmanNGD)
    if alone.logit_variance is not None:
        prior = replace(first.options.filter, logit_variance=alone.logit_variance, logit_spread=0.0)
        first = replace(first, options=replace(first.options, filter=prior))
    method = alone if crops is None else fit(_with_views(first, crops), device=device)
    if task.options.method != "kalman":
        return method.state(), None
    shots = task.head.support.to(device) if task.head is not None else first.support
    with torch.no_grad():
        differences: Tensor = -method.head(shots.inputs)
        folds = []
        for held, head, part in _without_a_fold(first, crops, device):
            differences[held] += head.head(part.features)
            folds.append((head, part))
    if not folds:
        return method.state(), None
    if crops is None:  # its tau is chosen as that of any head
        return method.state(), HeldOut(differences)
    assert task.head is not None
    found = calibration_of(folds, task.head.posterior)
    return method.state(), HeldOut(differences, found.tau, found.scaling)
