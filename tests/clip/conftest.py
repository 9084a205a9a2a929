"""The embedded model, small random transformers, and never a word with the hub."""

import json
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

import open_clip

from kngd_ray.clip._model import ClipModel, ModelConfig, load_model

VIT = "kngd-test-vit"  # two layers a tower, projections as bare parameters
CUSTOM = "kngd-test-custom"  # open_clip's own attention class in the image tower, and the text tower apart
_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
_VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}


@pytest.fixture(scope="session")
def mini() -> ClipModel:
    return load_model(ModelConfig())


@pytest.fixture(scope="session")
def architectures(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("networks")
    custom = {"block_type": "custom", "qk_norm": True, "scale_heads": True, "scale_attn_inner": True}
    for name, vision, more in ((VIT, {}, {}), (CUSTOM, custom, {"custom_text": True})):
        config = {"embed_dim": 24, "vision_cfg": _VISION | vision, "text_cfg": _TEXT, **more}
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


@pytest.fixture(scope="session")
def vit(architectures) -> ClipModel:
    return load_model(ModelConfig(VIT, "random"))


@pytest.fixture(scope="session")
def custom(architectures) -> ClipModel:
    return load_model(ModelConfig(CUSTOM, "random"))
