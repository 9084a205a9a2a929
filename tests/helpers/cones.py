"""Made features in two geometries: centred with a small logit scale, and in a cone with a large one, as in a CLIP."""

from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from kngd_ray.config import load_config
from kngd_ray.training.batches import Support
from kngd_ray.training.fit import FitTask

CLASSES, DIM, SCALE = 12, 48, 18.0
SHIPPED = {"classes": 20, "dim": 63}  # 64 dimensions in a cone
_CONE, _KAPPA = 0.65, 0.2  # length of what tells images apart; cosine that all images have with all texts


def made(
    shots: int,
    seed: int = 0,
    spread: float = 0.9,
    dtype: torch.dtype = torch.float64,
    classes: int = CLASSES,
    dim: int = DIM,
) -> tuple[Support, Tensor]:
    """Shots around their classes' texts, as far as CLIP knows the classes; and the texts (C, d)."""
    g = torch.Generator().manual_seed(3)
    texts = normalize(torch.randn(classes, dim, generator=g, dtype=torch.float64), dim=1)
    centres = texts + 0.8 * normalize(torch.randn(classes, dim, generator=g, dtype=torch.float64), dim=1)
    g = torch.Generator().manual_seed(10 + seed)
    labels = torch.arange(classes).repeat_interleave(shots)
    noise = torch.randn(len(labels), dim, generator=g, dtype=torch.float64) / dim**0.5
    x = normalize(centres[labels] + spread * noise, dim=1)
    return Support(x.to(dtype), labels), texts.to(dtype)


def in_a_cone(x: Tensor) -> Tensor:
    """Image features x (m, d) in CLIP's geometry: distances shrink, all share an offset."""
    return pad(pad(_CONE * x, (0, 1), value=sqrt(1 - _CONE**2)), (0, 1))


def texts_of_a_cone(texts: Tensor, scale: float = SCALE) -> Tensor:
    """Text embeddings that give images in a cone the same logits at scale 100, but for a constant."""
    b, kappa = scale / (100 * _CONE), _KAPPA / sqrt(1 - _CONE**2)
    return pad(pad(b * texts, (0, 1), value=kappa), (0, 1), value=sqrt(1 - b * b - kappa * kappa))


def task_of(support: Support, texts: Tensor, scale: float = SCALE, *overrides: str, seed: int = 0) -> FitTask:
    """The default's fit, or one with other settings."""
    return FitTask(load_config(overrides=["method=kalman", *overrides]).fit_options, seed, support, texts, scale)


def in_both(
    shots: int, *overrides: str, seed: int = 0, spread: float = 0.9, dtype: torch.dtype = torch.float64
) -> tuple[FitTask, FitTask]:
    """The same problem in the two geometries."""
    support, texts = made(shots, seed, spread, dtype)
    cone = Support(in_a_cone(support.features), support.labels)
    return (
        task_of(support, texts, SCALE, *overrides),
        task_of(cone, texts_of_a_cone(texts), 100.0, *overrides),
    )


def as_shipped(shots: int, *overrides: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> FitTask:
    """A fit where real ones happen: twenty classes, 64 dimensions, a cone, scale 100; by default that of `kalman`."""
    support, texts = made(shots, seed, dtype=dtype, **SHIPPED)
    cone = Support(in_a_cone(support.features), support.labels)
    return task_of(cone, texts_of_a_cone(texts), 100.0, *overrides, seed=seed)
