"""Several views of each picture for a head on frozen features, which count as one picture together.

A crop says nothing of the labels that its picture does not say. What it says is which features of a picture do not
matter to its label: a head that has seen crops is not surprised by them, nor by other pictures. So each of the V + 1
views of a picture is observed with V + 1 times the noise, and the posterior is as wide as that of the pictures.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kngd_ray.clip import CLIPNetwork
from kngd_ray.sharding import Group, split_evenly
from kngd_ray.training.batches import Shots, Support
from kngd_ray.training.loader import augment_of
from kngd_ray.training.options import FitOptions
from kngd_ray.training.pictures import Pictures, augmentation

_AT_ONCE = 64
_MOST = 1 << 14  # rows of a head's fit: of more pictures there are fewer views
_TURN = 1 << 20  # of the first view: what towers learn from later are other crops


@torch.no_grad()
def crops_of(network: CLIPNetwork, shots: Shots, seed: int, group: Group) -> Tensor | None:
    """What the pretrained image tower makes of random crops of the shots.

    Args:
        network: before its first step.
        shots: all of the fit, alike on every rank.
        seed: of the fit.
        group: the ranks, each of which encodes its share.

    Returns:
        (V, N, d) unit embeddings, alike on every rank; None where there are to be none.
    """
    crop, n = augment_of(network), len(shots)
    views = min(network.options.views, _MOST // max(n, 1) - 1)
    if crop is None or not isinstance(shots, Pictures) or not network.image_trained or views < 1 or not n:
        return None
    sizes = split_evenly(views * n, group.world_size)
    own = torch.arange(views * n).split(sizes)[group.rank]
    found = [network.class_embeddings.new_empty(0, network.embed_dim)]
    for some in own.split(_AT_ONCE):
        which = some % n
        seeds = [
            augmentation(seed, _TURN + view, i) for view, i in zip((some // n).tolist(), which.tolist(), strict=True)
        ]
        pixels = shots.load(which, network.pictures.decoded, augment=crop.crop, seeds=seeds)
        inputs = network.inputs(shots.labels[which.to(shots.labels.device)], image=network.received(pixels))
        found.append(network.encode(inputs["image"]))
    return group.gather_rows(torch.cat(found), sizes).view(views, n, -1)


def with_views(options: FitOptions, shots: Support, crops: Tensor) -> tuple[FitOptions, Support]:
    """A head's fit on pictures and crops of them.

    Args:
        options: of the fit on the pictures alone, the variance of its prior decided: folds over views would hold out
            views of pictures that they learn from.
        shots: features of the N pictures.
        crops: (V, N, d) of crops of them.

    Returns:
        Options under which they count as N, and features of all.
    """
    count = 1 + len(crops)
    features = torch.cat([shots.features, *crops.to(shots.features)])
    observation = tuple(replace(model, r0=count * model.r0) for model in options.observation)
    return replace(options, observation=observation), Support(features, shots.labels.repeat(count))
