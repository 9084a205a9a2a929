"""How wide the prior of towers is, said of functions: the variance of a logit on the shots.

One number of nats^2 for all trained weights of the towers together, which share it in proportion to the mean square of
their layers. The factor follows from the Jacobian where the fit starts ::

    v = mean over shots and classes of  diag(C J P J^T C)        C takes a logit's mean over classes

Random signs e over the classes need one backward pass for a batch: E[(C e)^T J P J^T C e] is the sum over classes.
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
_AT_ONCE = 32
_SIGNS = 4  # stream of random numbers, apart from those of batches, labels and crops


def widen_towers(method: KalmanNGD, shots: Shots, variance: float) -> float:
    """Give the towers the prior under which a logit varies by so much, before the first step.

    Args:
        method: a fit of towers, at its start; every rank calls this alike.
        shots: all of the fit, pictures as they are, or features where the image tower is frozen.
        variance: of a logit less the mean over classes, nats^2; 0 lets the towers be.

    Returns:
        By how much the prior was widened.
    """
    assert isinstance(method.posterior, StreamedPosterior)
    found = measured_variance(method, shots) if variance > 0 else 1.0
    factor = variance / found if found > 0 else 1.0
    method.posterior.widen_towers(factor)
    return factor


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
    total = 0.0
    for chunk in torch.linspace(0, max(n - 1, 0), min(n, _MEASURED)).round().long().split(_AT_ONCE):
        sizes = split_evenly(len(chunk), group.world_size)
        own = chunk.split(sizes)[group.rank]
        passed = posterior.observer.linearizer.run(_inputs(network, shots, own))
        C = network.classes
        signs = [torch.randint(2, (C,), generator=seeded(method.seed, int(i), _SIGNS)) * 2.0 - 1 for i in own]
        rows = torch.stack(signs) if signs else torch.empty(0, C)
        rows = pad(rows - rows.mean(1, keepdim=True), (0, passed.logits.shape[1] - C)).to(passed.logits)
        with tower_products(rows.device):
            H = passed.jacobian(rows.unsqueeze(1))
        observed = Observed(H, rows.new_zeros(len(chunk)), None, sizes, 1)
        total += float(posterior.filter.variances(method.belief, observed, names).sum())
        del H, observed
    return total / (min(n, _MEASURED) * network.classes) if n else 0.0


def _inputs(network: CLIPNetwork, shots: Shots, which: Tensor) -> dict[str, Tensor]:
    """Inputs of some shots as they are, on the network's device."""
    labels = shots.labels[which.to(shots.labels.device)]
    if isinstance(shots, Support):
        return network.inputs(labels, feature=shots.features[which.to(shots.features.device)])
    assert isinstance(shots, Pictures)
    return network.inputs(labels, image=network.received(shots.load(which, network.pictures.decoded)))
