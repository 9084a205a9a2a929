"""The embedded model, loaded once, and never a word with the hub."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

from kngd_ray.clip._model import ClipModel, ModelConfig, load_model


@pytest.fixture(scope="session")
def mini() -> ClipModel:
    return load_model(ModelConfig())
