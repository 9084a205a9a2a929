"""How wide the prior of towers is, in terms of functions: the variance of a logit on the shots.

One number of nats^2 for all trained weights of the towers together, which share it in proportion to the mean square of
their layers. The factor follows from the Jacobian where the fit starts ::

    v = mean over shots and classes of  diag(C J P J^T C)        C takes a logit's mean over classes

Random signs e over the classes need a backward pass each for a batch: E[(C e)^T J P J^T C e] is the sum over classes.
Where there are no more classes than passes it is taken as it is.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kngd_ray.clip import CLIPNetwork, tower_products
from kngd_ray.sharding import Observed, split_evenly
from kngd_ray.training.batches import Shots, Support, seeded
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.pictures import Pictures
from kngd_ray.training.streamed import StreamedPosterior

_MEASURED = 64  # shots
_AT_ONCE = 32  # rows: what a step of that many samples holds
_ROWS = 128  # at least, of all shots together
_SIGNS = 4  # stream of random numbers, apart from those of batches, labels and crops


def widen_towers(method: KalmanNGD, shots: Shots, variance: float) -> None:
    """Give the towers the prior under which a logit varies by this much, before the first step.

    Args:
        method: a fit of towers, at its start; every rank calls this alike.
        shots: all of the fit, pictures as they are, or features where the image tower is frozen.
        variance: of a logit less the mean over classes, nats^2; 0 keeps the towers as they are.
    """
    assert isinstance(method.posterior, StreamedPosterior)
    found = measured_variance(method, shots) if variance > 0 else 1.0
    factor = variance / found if found > 0 else 1.0
    method.posterior.widen_towers(factor)


def measured_variance(method: KalmanNGD, shots: Shots) -> float:
    """The variance that the towers give to a logit, as their belief is.

    Args:
        method: as of :func:`widen_towers`.
        shots: likewise.

    Returns:
        Nats^2, a mean over shots and classes; 0 without shots.
    """
    assert isinstance(method.head, CLIPNetwork)
    assert isinstance(method.posterior, StreamedPosterior)
    network, group, posterior = method.head, method.group, method.posterior
    names, n = set(posterior.of_towers), len(shots)
    C, total = network.classes, 0.0
    k = min(C, max(2, -(-_ROWS // max(n, 1))))
    for chunk in torch.linspace(0, max(n - 1, 0), min(n, _MEASURED)).round().long().split(max(1, _AT_ONCE // k)):
        sizes = split_evenly(len(chunk), group.world_size)
        own = chunk.split(sizes)[group.rank]
        passed = posterior.observer.linearizer.run(_inputs(network, shots, own))
        rows = (
            torch.stack([_directions(C, k, method.seed, i) for i in own.tolist()]) if len(own) else torch.empty(0, k, C)
        )
        rows = pad(rows - rows.mean(2, keepdim=True), (0, passed.logits.shape[1] - C)).to(passed.logits)
        with tower_products(rows.device):
            H = passed.jacobian(rows)
        observed = Observed(H, rows.new_zeros(k * len(chunk)), None, sizes, k)
        total += float(posterior.filter.variances(method.belief, observed, names).sum())
        del H, observed
    return total / (min(n, _MEASURED) * C) if n else 0.0


def _directions(C: int, k: int, seed: int, shot: int) -> Tensor:
    """(k, C) directions e of logits, whose sum of e e^T is the identity on average."""
    if k == C:
        return torch.eye(C)
    return (torch.randint(2, (k, C), generator=seeded(seed, shot, _SIGNS)) * 2.0 - 1) / k**0.5


def _inputs(network: CLIPNetwork, shots: Shots, which: Tensor) -> dict[str, Tensor]:
    """Inputs of some shots as they are, on the network's device."""
    labels = shots.labels[which.to(shots.labels.device)]
    if isinstance(shots, Support):
        return network.inputs(labels, feature=shots.features[which.to(shots.features.device)])
    assert isinstance(shots, Pictures)
    return network.inputs(labels, image=network.received(shots.load(which, network.pictures.decoded)))
