"""The random crop is torchvision's, and a function of its generator alone."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from kngd_ray.clip._augment import RandomResizedCrop

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
CFG = {
    "size": 24,
    "mode": "RGB",
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def photo(width, height):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(48, 36), (30, 70), (5, 5), (400, 3), (3, 400), (1, 1)])
@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.08, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_torchvision_with_the_same_seed(size, scale, interpolation):
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose([
        transforms.RandomResizedCrop(24, scale=scale, interpolation=mode),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])
    ours = RandomResizedCrop.of(CFG | {"interpolation": interpolation}, scale)
    for seed in range(8):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = theirs(photo(*size))
        assert torch.equal(ours(photo(*size), generator(seed)), expected)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    RandomResizedCrop.of(CFG)(photo(40, 30), generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_and_processes_draw_the_same():
    crop, picture = RandomResizedCrop.of(CFG), photo(64, 48)
    alone = [crop(picture, generator(seed)) for seed in range(40)]
    assert not torch.equal(alone[0], alone[1])
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: pickle.loads(pickle.dumps(crop))(picture, generator(seed)), range(40)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_boxes_are_inside_and_of_the_sizes_asked_for():
    crop = RandomResizedCrop((8, 8), MEAN, STD, scale=(0.5, 0.9))
    draws = generator(0)
    for _ in range(500):
        top, left, height, width = crop.box(200, 150, draws)
        assert min(top, left) >= 0
        assert top + height <= 150
        assert left + width <= 200
        assert 0.49 <= width * height / (200 * 150) <= 0.91
        assert 0.74 <= width / height <= 1.35


@pytest.mark.parametrize(("width", "height"), [(1000, 1), (1, 1000), (2, 3)])
def test_a_box_is_never_empty(width, height):
    crop = RandomResizedCrop((4, 4), MEAN, STD, ratio=(0.1, 0.2))
    for seed in range(20):
        assert min(crop.box(width, height, generator(seed))[2:]) >= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_mode_and_sizes_that_are_not_square(mode):
    made = RandomResizedCrop.of(CFG | {"size": (20, 12)})(photo(40, 30).convert(mode), generator(0))
    assert (made.shape, made.dtype) == ((3, 20, 12), torch.float32)
    assert made.isfinite().all()


def test_a_whole_picture_is_only_resized_and_normalised():
    made = RandomResizedCrop((30, 30), MEAN, STD, scale=(1.0, 1.0), ratio=(1.0, 1.0))(photo(30, 30), generator(0))
    pixels = np.asarray(photo(30, 30)).transpose(2, 0, 1) / 255
    expected = (pixels - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert np.abs(made.numpy() - expected).max() < 1e-5


def test_settings_of_a_model():
    crop = RandomResizedCrop.of({"size": 8, "mean": 0.5, "std": 0.25, "interpolation": "random"}, (0.2, 0.4))
    assert (crop.size, crop.mean, crop.std, crop.scale) == ((8, 8), (0.5,) * 3, (0.25,) * 3, (0.2, 0.4))
    assert crop(photo(9, 9), generator(0)).shape == (3, 8, 8)
    assert RandomResizedCrop.of(CFG | {"size": [8, 9], "mean": list(MEAN)}).size == (8, 9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", (0, 8)),
        ("size", (8,)),
        ("mean", (0.5,)),
        ("std", (0.0, 1.0, 1.0)),
        ("interpolation", "cubic"),
        ("scale", (0.0, 1.0)),
        ("scale", (0.9, 0.5)),
        ("scale", (0.5, 1.5)),
        ("ratio", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
        ("scale", (float("nan"), 1.0)),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}"):
        RandomResizedCrop(**({"size": (8, 8), "mean": MEAN, "std": STD} | {field: value}))
