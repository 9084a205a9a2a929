"""CLIP models, prompts, the zero-shot head, the adapters on it, and the towers' own training.

What needs torch is imported when it is asked for: whoever reads the settings needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kngd_ray.clip._config import LOGIT_SCALE, PRECOMPUTED, ModelConfig, check_without_towers
from kngd_ray.clip._prompts import expand, resolve_templates, same_sentences, worded
from kngd_ray.clip._tuning import TuneOptions

if TYPE_CHECKING:
    from kngd_ray.clip._augment import RandomResizedCrop
    from kngd_ray.clip._head import CLIPHead
    from kngd_ray.clip._model import ClipModel, load_model
    from kngd_ray.clip._network import CLIPNetwork, Head
    from kngd_ray.clip._precomputed import PrecomputedModel, given_precomputed, load_precomputed, read_class_embeddings
    from kngd_ray.clip._transfer import best_device, tower_products

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

_HOMES = {
    "CLIPHead": "_head",
    "CLIPNetwork": "_network",
    "ClipModel": "_model",
    "Head": "_network",
    "PrecomputedModel": "_precomputed",
    "RandomResizedCrop": "_augment",
    "best_device": "_transfer",
    "given_precomputed": "_precomputed",
    "load_model": "_model",
    "load_precomputed": "_precomputed",
    "read_class_embeddings": "_precomputed",
    "tower_products": "_transfer",
}


def __getattr__(name: str) -> Any:
    if name == "AnyModel":
        found = __getattr__("PrecomputedModel") | __getattr__("ClipModel")
    elif name in _HOMES:
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found
