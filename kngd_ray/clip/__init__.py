"""CLIP models, prompts, the zero-shot head, the adapters on it, and the towers' own training."""

from kngd_ray.clip._augment import RandomResizedCrop
from kngd_ray.clip._head import CLIPHead
from kngd_ray.clip._model import ClipModel, ModelConfig, load_model
from kngd_ray.clip._network import CLIPNetwork, Head
from kngd_ray.clip._prompts import resolve_templates
from kngd_ray.clip._tuning import TuneOptions

__all__ = [
    "CLIPHead",
    "CLIPNetwork",
    "ClipModel",
    "Head",
    "ModelConfig",
    "RandomResizedCrop",
    "TuneOptions",
    "load_model",
    "resolve_templates",
]
