"""Frozen features with Ray Data are those of this process."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kngd_ray.clip import ModelConfig, load_model
from kngd_ray.data import BadImage, DataConfig, FeatureCache, encode_missing, fill_cache, open_images
from kngd_ray.ray_jobs import ray_stream

pytestmark = pytest.mark.ray


def test_ray_data_computes_the_features_of_one_process(ray_up: None, small_data: Path, tmp_path: Path) -> None:
    images = open_images(DataConfig(path=str(small_data), train_domain="noto"))
    model = load_model(ModelConfig())
    everything = np.arange(len(images))
    ours, theirs = (FeatureCache(tmp_path / name, "model", model.embed_dim) for name in ("one", "ray"))
    encode_missing(images, everything, ours, lambda pictures: model.encode_images(pictures).numpy())
    seen: list[tuple[int, int]] = []
    bad = fill_cache(
        images, everything, theirs, ray_stream(images, ModelConfig(), encoders=2), progress=lambda *n: seen.append(n)
    )
    assert bad == frozenset()
    assert seen[-1] == (len(images), len(images))
    assert np.abs(ours.read(images.keys) - theirs.read(images.keys)).max() < 1e-5
    # everything is there: Ray is not asked again
    assert fill_cache(images, everything, theirs, ray_stream(images, ModelConfig(), encoders=2)) == frozenset()


def test_bad_pictures_are_named_or_counted(ray_up: None, small_data: Path, tmp_path: Path) -> None:
    table = pq.read_table(small_data)
    pictures = table["image"].to_pylist()
    pictures[5] = b"no picture"
    path = tmp_path / "bad.parquet"
    pq.write_table(table.set_column(0, "image", pa.array(pictures)), path)
    images = open_images(DataConfig(path=str(path), train_domain="noto"))
    cache = FeatureCache(tmp_path / "features", "model", 256)
    stream = ray_stream(images, ModelConfig(), encoders=1)
    few = np.arange(12)
    with pytest.raises(BadImage, match=r"bad\.parquet, row 5: the picture cannot be decoded"):
        fill_cache(images, few, cache, stream)
    assert fill_cache(images, few, cache, stream, on_bad_image="skip") == frozenset({5})
    assert cache.missing(images.keys[few]) == {images.keys[5]}
