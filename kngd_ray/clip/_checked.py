"""Check a written model: compare its logits of a few pictures with the network's."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kngd_ray.clip import lora
from kngd_ray.clip._model import ClipModel
from kngd_ray.clip._network import CLIPNetwork
from kngd_ray.clip.adapters import Adapter
from kngd_ray.errors import ModelError

CHECKED = 4  # pictures and at most four times as many texts that a written file is compared on
_TOLERANCE = 1e-4  # largest difference of logits, as a part of the logit scale


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        difference: largest absolute difference between its logits and the network's; None if not checked.
        notes: what the file does not hold, or needs; a sentence each.
    """

    path: Path
    difference: float | None
    notes: tuple[str, ...] = ()


@contextmanager
def merged(network: CLIPNetwork) -> Iterator[Any]:
    """The towers merged, on the CPU in float32, while the network's own weights are the averaged ones."""
    with network.blended(network.options.alpha):
        clip: Any = lora.merge(copy.deepcopy(network.clip).cpu().float()).requires_grad_(False)
        if network.options.checkpointing:
            clip.set_grad_checkpointing(False)
        yield clip


def logits_of(clip: Any, pictures: Tensor, prompts: Tensor, adapters: list[Adapter]) -> Tensor:
    """Logits (m, C) of pictures and prompts by a model's towers and adapters of the image embedding."""
    weight = clip.logit_scale
    with torch.no_grad():
        z = normalize(clip.encode_image(pictures.to(weight)), dim=-1)
        for adapter in adapters:
            z = adapter.to(z).image(z)
        t = normalize(clip.encode_text(prompts.to(weight.device)), dim=-1)
        return (weight.exp() * normalize(z, dim=-1) @ t.mT).cpu().float()


def difference_of(found: Tensor, expected: Tensor, scale: float, path: Path) -> float:
    """Largest absolute difference of logits.

    Raises:
        ModelError: It is more than rounding.
    """
    difference = float((found - expected).abs().max())
    if not difference <= _TOLERANCE * max(scale, 1.0):
        raise ModelError(
            f"{path} gives logits that differ from the network's by {difference:.2g}: do not use it, and check "
            "that the weights are finite"
        )
    return difference


def size_of(model: ClipModel) -> int | tuple[int, int]:
    """H and W of the pictures that a model takes, or both."""
    size = model.preprocess_cfg["size"]
    return size if isinstance(size, int) else (size[0], size[1])


def random_pictures(size: int | tuple[int, int]) -> Tensor:
    """Seeded noise (m, 3, H, W) in place of transformed pictures."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(CHECKED, 3, height, width, generator=torch.Generator().manual_seed(0))
