"""Frozen features with Ray Data are those of this process."""

import gc
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from helpers.cases import make_options, make_task
from helpers.resuming import IDENTITY
from ray.exceptions import ActorDiedError
from ray.train.torch import TorchTrainer

from kngd_ray.clip import ModelConfig, load_model
from kngd_ray.cluster import ray_stream, run_job
from kngd_ray.config import TrainerConfig, load_config
from kngd_ray.data import BadImage, DataConfig, FeatureCache, encode_missing, fill_cache, open_images
from kngd_ray.errors import DataError, KngdError, ModelError
from kngd_ray.training.job import Job
from kngd_ray.training.views import crops_of

pytestmark = pytest.mark.ray


def test_ray_data_computes_the_features_of_one_process(ray_up: None, small_data: Path, tmp_path: Path) -> None:
    """And names or counts a picture that cannot be decoded. One pass over the data for all, as its start takes long."""
    table = pq.read_table(small_data)
    pictures = table["image"].to_pylist()
    pictures[5] = b"no picture"
    path = tmp_path / "bad.parquet"
    pq.write_table(table.set_column(0, "image", pa.array(pictures)), path)
    images = open_images(DataConfig(path=str(path), train_domain="noto"))
    model = load_model(ModelConfig())
    everything = np.arange(len(images))
    good = np.delete(everything, 5)
    ours, theirs, refused = (FeatureCache(tmp_path / name, "model", model.embed_dim) for name in ("one", "ray", "bad"))
    encode_missing(images, good, ours, lambda pictures: model.encode_images(pictures).numpy())
    stream = ray_stream(images, ModelConfig(), encoders=2)
    arrived = list(stream(everything))
    seen: list[tuple[int, int]] = []
    bad = fill_cache(
        images,
        everything,
        theirs,
        lambda todo: iter(arrived),
        on_bad_image="skip",
        progress=lambda *n: seen.append(n),
    )
    assert bad == frozenset({5})
    assert theirs.missing(images.keys) == {images.keys[5]}
    assert seen[-1] == (len(images), len(images))
    assert np.abs(ours.read(images.keys[good]) - theirs.read(images.keys[good])).max() < 1e-5
    with pytest.raises(BadImage, match=r"bad\.parquet, row 5: the picture cannot be decoded"):
        fill_cache(images, everything, refused, lambda todo: iter(arrived))
    # everything is there: Ray is not asked again
    assert fill_cache(images, good, theirs, stream) == frozenset()


@pytest.mark.slow
def test_ray_data_computes_the_crops_of_one_process(ray_up: None, small_data: Path, tmp_path: Path) -> None:
    images, model = open_images(DataConfig(path=str(small_data), train_domain="noto")), load_model(ModelConfig())
    crops = crops_of(load_config(overrides=["method=kalman", "tune.views=2"]).fit_options, model, 8)
    assert crops is not None
    some = np.arange(8)
    ours, theirs = (FeatureCache(tmp_path / name, "model", model.embed_dim) for name in ("one", "ray"))
    encode_missing(images, some, ours, lambda pictures: model.encode_images(pictures).numpy(), crops=crops)
    stream = ray_stream(images, ModelConfig(), encoders=1, crops=crops)
    assert fill_cache(images, some, theirs, stream, crops=crops) == frozenset()
    keys = crops.keys(images.keys[some]).ravel()
    assert len(keys) == 16
    assert np.abs(ours.read(keys) - theirs.read(keys)).max() < 1e-5


def failure(path: Path, model: ModelConfig, during: Callable[[], None] = lambda: None) -> KngdError:
    """What encoding ends with; the file is read, then something happens to it."""
    images = open_images(DataConfig(path=str(path)))
    during()
    with pytest.raises(KngdError) as error:
        list(ray_stream(images, model, encoders=1)(np.arange(12)))
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
    return error.value


def test_errors_on_workers_are_ours_in_one_sentence(ray_up: None, small_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.parquet"
    path.write_bytes(small_data.read_bytes())
    gone = failure(path, ModelConfig(), path.unlink)
    assert type(gone) is DataError
    assert f"{path} cannot be read" in str(gone)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_failed_encoding_keeps_no_cores_from_the_job_after_it(ray_up: None, small_data: Path, tmp_path: Path) -> None:
    gc.disable()  # what is left behind stays until somebody sees to it
    try:
        lost = failure(small_data, ModelConfig("ViT-B-32", str(tmp_path / "lost.pt")))
        assert type(lost) is ModelError
        assert "there is no checkpoint file" in str(lost)
        del lost  # and with it the frames that it came through
        fits = {"kalman-seed0": make_task(make_options(epochs=1))}
        run_job(Job(fits, IDENTITY, tmp_path / "run"), TrainerConfig(num_workers=2), lambda event: None)
    finally:
        gc.enable()


def test_a_worker_that_dies_is_named_with_the_way_out(
    ray_up: None, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise ActorDiedError

    monkeypatch.setattr(ray.data.Dataset, "iter_batches", die)
    died = failure(small_data, ModelConfig())
    assert str(died).startswith("encoding features with Ray failed (The actor died unexpectedly")
    assert "trainer.num_workers=0" in str(died)


@pytest.mark.slow
def test_relative_paths_reach_workers_that_are_elsewhere(
    ray_up: None, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what they fail with leaves both cores to the job after it."""
    weights = resources.files("kngd_ray") / "assets" / "mini_clip" / "open_clip_model.safetensors"
    (tmp_path / "pictures.parquet").write_bytes(small_data.read_bytes())
    (tmp_path / "weights.safetensors").write_bytes(weights.read_bytes())
    monkeypatch.chdir(tmp_path)
    gc.disable()  # what is left behind stays until somebody sees to it
    try:
        # another architecture: what is refused is the checkpoint's content, so it was found
        found = failure(Path("pictures.parquet"), ModelConfig("RN50", "weights.safetensors"))
        assert type(found) is ModelError
        assert str(found).startswith(f"{tmp_path}/weights.safetensors is not a checkpoint of RN50")
        del found  # and with it the frames that it came through
        monkeypatch.setattr(TorchTrainer, "fit", lambda trainer: both_cores())
        fits = {"kalman-seed0": make_task(make_options(epochs=1))}
        run_job(Job(fits, IDENTITY, tmp_path / "run"), TrainerConfig(num_workers=2), lambda event: None)
    finally:
        gc.enable()


def both_cores() -> None:
    """What a job of two workers waits for before it starts them."""
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0.0) < 2:
        assert time.monotonic() < deadline, "a failed encoding has kept a core"
        time.sleep(0.1)
