"""CLIP models, prompts, the zero-shot head, the adapters on it, and the towers' own training."""

from kngd_ray.clip._augment import RandomResizedCrop
from kngd_ray.clip._config import LOGIT_SCALE, PRECOMPUTED, ModelConfig, check_without_towers
from kngd_ray.clip._head import CLIPHead
from kngd_ray.clip._model import ClipModel, load_model
from kngd_ray.clip._network import CLIPNetwork, Head
from kngd_ray.clip._precomputed import PrecomputedModel, given_precomputed, load_precomputed, read_class_embeddings
from kngd_ray.clip._prompts import expand, resolve_templates, same_sentences, worded
from kngd_ray.clip._transfer import best_device, tower_products
from kngd_ray.clip._tuning import TuneOptions

# What embeds classes; the second has towers that embed pictures and texts as well.
AnyModel = PrecomputedModel | ClipModel

__all__ = [
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
    "best_device",
    "check_without_towers",
    "expand",
    "given_precomputed",
    "load_model",
    "load_precomputed",
    "read_class_embeddings",
    "resolve_templates",
    "same_sentences",
    "tower_products",
    "worded",
]
