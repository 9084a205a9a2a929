"""CLIP models, prompts, the zero-shot head, the adapters on it, and the towers' own training.

What needs torch is imported when it is asked for: whoever reads the settings needs none of it.
"""

from typing import TYPE_CHECKING

from kngd_ray._deferred import on_demand
from kngd_ray.clip._config import (
    EMBEDDED_MODEL,
    LOGIT_SCALE,
    PRECOMPUTED,
    ModelConfig,
    check_without_towers,
    public_name,
)
from kngd_ray.clip._prompts import expand, resolve_templates, same_sentences, worded
from kngd_ray.clip._tuning import TuneOptions

if TYPE_CHECKING:
    from kngd_ray.clip._augment import RandomResizedCrop, augmentation_of
    from kngd_ray.clip._head import CLIPHead
    from kngd_ray.clip._model import AnyModel, ClipModel, load_model
    from kngd_ray.clip._network import CLIPNetwork, Head
    from kngd_ray.clip._precomputed import PrecomputedModel, given_precomputed, load_precomputed, read_class_embeddings
    from kngd_ray.clip._transfer import best_device, tower_products

__all__ = [
    "EMBEDDED_MODEL",
    "LOGIT_SCALE",
    "PRECOMPUTED",
    "AnyModel",
    "CLIPHead",
    "CLIPNetwork",
    "ClipModel",
    "Head",
    "ModelConfig",
    "PrecomputedModel",
    "RandomResizedCrop",
    "TuneOptions",
    "augmentation_of",
    "best_device",
    "check_without_towers",
    "expand",
    "given_precomputed",
    "load_model",
    "load_precomputed",
    "public_name",
    "read_class_embeddings",
    "resolve_templates",
    "same_sentences",
    "tower_products",
    "worded",
]

_HOMES = {
    "AnyModel": "_model",
    "CLIPHead": "_head",
    "CLIPNetwork": "_network",
    "ClipModel": "_model",
    "Head": "_network",
    "PrecomputedModel": "_precomputed",
    "RandomResizedCrop": "_augment",
    "augmentation_of": "_augment",
    "best_device": "_transfer",
    "given_precomputed": "_precomputed",
    "load_model": "_model",
    "load_precomputed": "_precomputed",
    "read_class_embeddings": "_precomputed",
    "tower_products": "_transfer",
}

__getattr__ = on_demand(__name__, _HOMES)
