"""The head of trained towers, fitted again on what they have come to see in its shots.

While towers are trained, their head gives way to them in the linear terms of each batch. Where they have ended, a shot
has other features than the head was fitted on. So it is conditioned on all shots once more, as the head that they
started from was, on the features of the trained towers.

Its prior stays what the shots decided then: how far the zero-shot logits are believed, and how much a logit may vary.
Folds over features that were themselves fitted to the shots would decide on a prior that is too wide.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from kngd_ray.clip import CLIPNetwork
from kngd_ray.data import Crops, decode
from kngd_ray.errors import FilterError
from kngd_ray.filters import ZeroShot
from kngd_ray.sharding import Group, split_evenly
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import decided_task
from kngd_ray.training.fit import FitTask, fit, head_task
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.loader import decoding_threads
from kngd_ray.training.method import Method
from kngd_ray.training.pictures import Pictures
from kngd_ray.training.start import from_first, take_covariance
from kngd_ray.training.views import drawn

logger = logging.getLogger(__name__)
_AT_ONCE = 64  # pictures and crops


def refits(task: FitTask) -> bool:
    """Whether a fit of towers ends with that of its head; one that is scored by its steps has no use for it."""
    return task.options.refits and task.head is not None and task.prior is None and not task.prequential


def refit_head(task: FitTask, method: Method, group: Group, device: torch.device | str = "cpu") -> None:
    """Condition the head of trained towers on their features of the shots.

    Where that cannot be done, the head stays as the towers left it, which a warning tells: they have taken their time.

    Args:
        task: a fit of towers that started at a head, see :func:`refits`.
        method: after its last step; the head's mean and covariance are written into its belief.
        group: the ranks, which share the pictures among them.
        device: where to compute.
    """
    assert isinstance(method, KalmanNGD)
    network = method.head
    assert isinstance(network, CLIPNetwork)
    first = decided_task(head_task(task), device=device)
    prior = replace(first.options.filter, mean=ZeroShot(gamma=network.head.gamma))
    first = replace(first, options=replace(first.options, filter=prior))
    with torch.no_grad():
        seen = _features(network, task, group) if network.image_trained else first.support
        classes = network.classifier().to(first.class_embeddings)
        on_trained = replace(first, support=seen, class_embeddings=classes)
    fitted, reason = None, ""
    try:
        again = fit(on_trained, device=device)
        assert isinstance(again, KalmanNGD)
        fitted = again.state()
    except FilterError as error:
        reason = str(error)
    failed = group.sum(torch.tensor(float(fitted is None), device=device))  # processors may round differently
    if fitted is None or bool(failed):
        logger.warning("the head stays as the trained towers left it, as it could not be fitted again: %s", reason)
        return
    with torch.no_grad():
        for name, weight in network.head.named_parameters():
            if name in fitted.weights:
                weight.copy_(from_first(fitted.weights[name].to(weight), group))
    take_covariance(method, fitted, None)


def _features(network: CLIPNetwork, task: FitTask, group: Group) -> Support:
    """Features of the shots by the trained image tower, and of the crops that the first head has seen."""
    shots, first = task.support, task.head
    assert isinstance(shots, Pictures)
    assert first is not None
    count = first.support.views - 1
    crops = drawn(network, network.options, count) if count else None
    sizes = split_evenly(len(shots), group.world_size)
    own = torch.arange(len(shots)).split(sizes)[group.rank]
    like = network.class_embeddings
    encoded = [like.new_empty(0, 1 + count, network.embed_dim)]
    with ThreadPoolExecutor(decoding_threads(group.world_size), "pictures") as pool:
        for some in own.split(max(1, _AT_ONCE // (1 + count))) if len(own) else ():  # ranks may outnumber shots
            views = list(pool.map(lambda i: _views(network, shots, int(i), crops), some))
            pixels = network.received(torch.cat(views)).to(like.dtype)
            encoded.append(network.encode(pixels).unflatten(0, (len(some), -1)))
    found = group.gather_rows(torch.cat(encoded), sizes).to(first.support.features.dtype)
    return Support(found[:, 0], shots.labels.to(like.device), found[:, 1:] if count else None)


def _views(network: CLIPNetwork, shots: Pictures, shot: int, crops: Crops | None) -> Tensor:
    """(1 + V, 3, H, W) a shot as it is, then its crops."""
    place = int(shots.positions[shot])
    picture = decode(shots.file.read(place), shots.file.place(place))
    of_it = [] if crops is None else crops.of(picture, shots.file.keys[place])
    return torch.stack([network.pictures.decoded(view) for view in (picture, *of_it)])
