"""What a fit takes from its shots before the first step: the prior.

Four things, each only where the options ask for it: what features are measured from (``centred``), how far the
zero-shot logits are believed (``filter.mean``), with which inputs the outputs of a layer may vary
(``filter.covariance.columns``), and by how much (``filter.logit_variance``).
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import log

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kngd_ray.clip import CLIPHead
from kngd_ray.filters import Classified, Covariance, Factors, HeldOut, Kronecker, common_offset
from kngd_ray.sharding import Group
from kngd_ray.training.at_mode import ModePosterior
from kngd_ray.training.batches import Support
from kngd_ray.training.folds import ENOUGH, fold_of, single, twins_of
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.method import centres
from kngd_ray.training.options import FilterOptions

_AT_ONCE = 1024  # shots
_REACH = 0.01  # variance, in typical ones, along which half of the shots' mean counts as their own
_MEASURED = 256  # shots that a prior variance of logits is measured on
_CLASSES = 4  # likewise
_FOLDS = 3
_VARIANCES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)  # nats^2
_TOLERANCE = 0.3  # nats, of the last step: folds are compared, not kept, and what it leaves is a tenth
_LINEARISATIONS = 30


def centre(head: CLIPHead, shots: Support) -> None:
    """Let adapters that measure features from what all images share do so.

    Args:
        head: untrained.
        shots: all of the fit, on every rank.
    """
    for buffer in centres(head).values():
        if len(shots):
            buffer.copy_(common_offset(shots.features.double(), _REACH))


def inform(method: KalmanNGD, options: FilterOptions, shots: Support, learned: Support) -> None:
    """Let shots inform the prior of a fit that has taken no step.

    Args:
        method: the fit, at its pretrained weights.
        options: of its filter.
        shots: all of the fit, on every rank: the pictures as they are, from which numbers are chosen.
        learned: the samples that are learned from, by which features are measured: these, or all views of them.
    """
    head = method.head
    assert isinstance(head, CLIPHead)
    found = decided(head, options, shots, at_mode=isinstance(method.posterior, ModePosterior))
    gamma, chosen = _agreed(method.group, shots.features, *found)
    head.gamma = gamma  # by which adapters of embeddings count too
    covariance, p0 = _measured(method, learned), options.weight_variance
    if chosen is not None and len(shots):
        unit = _variance_of_logits(method, covariance, learned)
        if unit > 0:
            covariance = method.family.predict(covariance, chosen / unit, 0.0, method.group.sum)
            p0 *= chosen / unit
    chosen_by_shots = chosen if options.logit_spread else None
    method.begin_at(covariance, gamma=gamma, p0=p0, logit_variance=chosen_by_shots)


def decided(head: CLIPHead, options: FilterOptions, shots: Support, *, at_mode: bool) -> tuple[float, float | None]:
    """The numbers of a prior that shots decide.

    Args:
        head: untrained.
        options: of the filter.
        shots: all of the fit.
        at_mode: whether the fit goes to its mode.

    Returns:
        Gamma, and the prior variance of a logit in nats^2; None where the options give it to weights.
    """
    with torch.no_grad():
        logits = torch.cat([head(features) for features in shots.features.split(_AT_ONCE)])
    gamma = options.mean.factor(logits, shots.labels)
    variance, spread = options.logit_variance, options.logit_spread
    if not (variance and spread):
        return gamma, variance
    if not at_mode:  # a step that may stop short of its mode, or logits that are bounded: the prior's lower end
        return gamma, options.cautious_variance
    if not len(shots) or single(shots.labels, twins_of(shots)):
        return gamma, variance
    return gamma, likeliest_variance(head, options, shots, gamma * logits)


def likeliest_variance(head: CLIPHead, options: FilterOptions, shots: Support, logits: Tensor) -> float:
    """The prior variance of a logit under which held-out shots are most likely.

    Args:
        head: with a class residual.
        options: median and spread of the prior of that variance, and the family.
        shots: all of the fit, several of a class.
        logits: (N, C) at the prior's mean.

    Returns:
        Nats^2, of a grid and the median.
    """
    family, residual = options.covariance, head.residual
    median = options.logit_variance
    assert median is not None
    assert residual is not None
    assert isinstance(family, Kronecker)
    fold, x = fold_of(shots.labels, _FOLDS, twins_of(shots)), residual.inputs(shots.features)
    parts, held_out = [], []
    for f in range(_FOLDS):
        held, kept = fold == f, fold != f
        if not bool(held.any()) or not bool(kept.any()):
            continue
        A = family.columns_of(x[kept], shots.labels[kept])
        seen = Classified(x[kept], logits[kept], shots.labels[kept], 1.0)
        parts.append((A / varied(A, x[kept]), seen, x[held]))
        held_out.append(held)
        if sum(map(len, held_out)) >= ENOUGH:
            break
    folds = HeldOut(parts, tolerance=_TOLERANCE, linearisations=_LINEARISATIONS)

    def score(v: float) -> float:
        moved = folds.logits(v)
        loss = sum(
            cross_entropy(logits[held].double() + by, shots.labels[held], reduction="sum")
            for held, by in zip(held_out, moved, strict=True)
        )
        return -float(loss) - 0.5 * (log(v / median) / options.logit_spread) ** 2

    variances = sorted({*_VARIANCES, median})
    return variances[_climbed([partial(score, v) for v in variances], variances.index(median))]


def _climbed(scores: Sequence[Callable[[], float]], start: int) -> int:
    """The place of a highest score in a row, climbed to from a place for as long as scores rise."""
    found = {start: scores[start]()}
    for step in (-1, 1):
        here = start
        while 0 <= here + step < len(scores):
            found[here + step] = scores[here + step]()
            if found[here + step] <= found[here]:
                break
            here += step
        if here != start:
            return here
    return start


def varied(A: Tensor, x: Tensor) -> float:
    """How much a layer's outputs vary around their mean over inputs, each weight of variance A.

    Args:
        A: (i, i) covariance of columns.
        x: (N, i) inputs.

    Returns:
        Mean of (x - mean)^T A (x - mean); 1 where inputs do not vary.
    """
    centred = x - x.mean(0)
    found = float(((centred @ A.to(x)) * centred).sum(1).double().mean())
    return found if found > 0 else 1.0


def _agreed(group: Group, like: Tensor, gamma: float, variance: float | None) -> tuple[float, float | None]:
    """What the first rank decided, on every rank: processors of several kinds may round differently."""
    if group.world_size == 1:
        return gamma, variance
    told = like.new_tensor([gamma, variance or 0.0], dtype=torch.float64) * (group.rank == 0)
    gamma, agreed = group.sum(told).tolist()
    return gamma, None if variance is None else agreed


def _measured(method: KalmanNGD, shots: Support) -> Covariance:
    """The prior covariance, its columns measured on the inputs that the shots give to each layer."""
    family, covariance = method.family, method.belief.covariance
    if not isinstance(family, Kronecker) or family.columns == "identity":
        return covariance
    if isinstance(method.posterior, ModePosterior):  # its one layer's inputs are known without a pass
        x = method.posterior.residual.inputs(shots.features)
        return {name: family.informed_layer(state, x, shots.labels) for name, state in covariance.items()}
    inputs: dict[str, list[Tensor]] = {}
    for features in shots.features.split(_AT_ONCE):
        passed = method.observer.linearizer.run(features)
        H = passed.jacobian(torch.ones_like(passed.logits).unsqueeze(1))
        for layer in method.observer.layers:
            found = H[layer.name] if layer.factored else None
            if isinstance(found, Factors) and found.own_x:
                inputs.setdefault(layer.name, []).append(found.x.mean(1))
    return {
        name: family.informed_layer(state, torch.cat(inputs[name]), shots.labels) if name in inputs else state
        for name, state in covariance.items()
    }


def _variance_of_logits(method: KalmanNGD, covariance: Covariance, shots: Support) -> float:
    """The prior variance of a logit around its mean over the shots, nats^2: the mean of some shots and classes."""
    if isinstance(method.posterior, ModePosterior):
        (name,) = (layer.name for layer in method.observer.layers)
        mine = 0.0
        if name in covariance:
            P, x = covariance[name], method.posterior.residual.inputs(shots.features)
            mine = method.head.logit_scale**2 * varied(P["A"], x) * float(P["B"].diagonal().mean())
        return float(method.group.sum(torch.tensor(mine, dtype=torch.float64, device=shots.features.device)))
    n = len(shots)
    which = torch.linspace(0, n - 1, min(n, _MEASURED), device=shots.labels.device).round().long()
    features = shots.features[which]
    passed = method.observer.linearizer.run(features)
    N, classes = passed.logits.shape
    some = torch.linspace(0, classes - 1, min(classes, _CLASSES), device=features.device).round().long()
    rows = torch.eye(classes, dtype=passed.logits.dtype, device=features.device)[some]
    H = passed.jacobian(rows.expand(N, *rows.shape))
    own = {
        part.layer.name: H[part.layer.name].part(part.start, part.stop)
        for part in method.posterior.filter.ownership.parts[method.group.rank]
    }
    M = N * len(some)
    share, _ = method.family.gram(covariance, own, passed.logits.new_zeros(M))
    gram = method.family.spread(method.group.sum(share), M).double().view(N, len(some), N, len(some))
    of_class = gram.diagonal(dim1=1, dim2=3)  # (N, N, classes)
    return float((of_class.diagonal(dim1=0, dim2=1).mean(1) - of_class.mean((0, 1))).mean())
