"""CLIP models, prompts, the zero-shot head and the adapters on it."""

from kngd_ray.clip._head import CLIPHead
from kngd_ray.clip._model import ClipModel, ModelConfig, load_model
from kngd_ray.clip._prompts import resolve_templates

__all__ = ["CLIPHead", "ClipModel", "ModelConfig", "load_model", "resolve_templates"]
