"""The head that a fit of towers starts from: fitted on pictures and crops of them, and by folds on parts of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import decided_task
from kngd_ray.training.fit import FitTask, fit, head_task
from kngd_ray.training.folds import fold_of, single, twins_of
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.method import Method, MethodState

_FOLDS = 4


def _without_a_fold(task: FitTask, device: torch.device | str) -> Iterator[tuple[Tensor, Method, Support]]:
    """Heads that have not seen some of the shots.

    Args:
        task: the head's fit, its prior decided.
        device: where to compute.

    Yields:
        (N,) which shots a head has not seen, the head, and these shots; nothing of shots whose classes it would lack.
    """
    shots = task.to(device).support
    assert isinstance(shots, Support)
    twins = twins_of(shots)
    if single(shots.labels, twins) or len(shots) < _FOLDS:
        return
    fold = fold_of(shots.labels, _FOLDS, twins)
    for f in range(_FOLDS):
        held = fold == f
        if bool(held.any()):
            part = task.part((~held).to(task.support.labels.device))
            yield held, fit(part, device=device), shots.subset(held)


def fitted_head(task: FitTask, device: torch.device | str) -> tuple[MethodState, Tensor | None]:
    """The head that towers start from, and for the filter what heads that have not seen a shot say of it.

    Args:
        task: of towers.
        device: where to compute.

    Returns:
        The head's fit; and (N, C) logits of the shots by heads that have not seen them, less the head's own, if any
        were held out.
    """
    first = head_task(task)
    method = fit(first, device=device)
    assert isinstance(method, KalmanNGD)
    fitted = method.state()
    if task.options.method != "kalman":
        return fitted, None
    shots = first.to(device).support
    assert isinstance(shots, Support)
    seen = False
    with torch.no_grad():
        differences: Tensor = -method.head(shots.features)
        for held, head, part in _without_a_fold(decided_task(first, fitted, device), device):
            differences[held] += head.head(part.features)
            seen = True
    return fitted, differences if seen else None
