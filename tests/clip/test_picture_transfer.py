"""Pictures travel as bytes and end as the same numbers; products of towers are fast for towers alone."""

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, RandomInvert

from kngd_ray.clip import ModelConfig, RandomResizedCrop, TuneOptions, load_model, tower_products
from kngd_ray.clip._network import CLIPNetwork
from kngd_ray.clip._transfer import PictureTransform, sent
from kngd_ray.data import decode
from kngd_ray.errors import DataError


def pictures(mode: str = "RGB") -> list[Image.Image]:
    generator = np.random.default_rng(0)
    made = [Image.fromarray(generator.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((200, 160), (90, 300))]
    return [picture.convert(mode) for picture in made]


def test_bytes_end_as_the_numbers_that_the_transform_gives(mini):
    found = torch.stack([mini.pictures.decoded(picture) for picture in pictures()])
    assert found.dtype == torch.uint8
    expected = torch.stack([mini.transform(picture) for picture in pictures()])
    assert torch.equal(mini.pictures.normalised(found), expected)
    assert torch.equal(mini.pictures.normalised(expected), expected)


def test_a_crop_too(mini):
    crop = RandomResizedCrop.of(mini.preprocess_cfg)
    for picture in pictures():
        found, expected = (made(picture, torch.Generator().manual_seed(3)) for made in (crop.crop, crop))
        assert found.dtype == torch.uint8
        assert torch.equal(mini.pictures.normalised(found.unsqueeze(0))[0], expected)


def test_a_transform_that_ends_in_another_way_stays_whole(mini):
    steps = mini.transform.transforms
    for transform in (Compose(steps[:-1]), Compose([*steps, RandomInvert(p=0.0)]), lambda picture: steps[-2](picture)):
        whole = PictureTransform(transform)
        found = whole.decoded(pictures()[0])
        assert found.dtype == torch.float32
        assert whole.normalised(found) is found


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode_are_encoded_as_before(mini, mode):
    found = mini.encode_images(pictures(mode))
    pixels = torch.stack([mini.transform(picture.convert("RGB")) for picture in pictures(mode)])
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # another layout rounds otherwise
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(mini.network.encode_image(pixels).float(), dim=-1)
    assert torch.equal(found, expected)


class Largest:
    """Notes the most pixels that a picture has on its way through a transform."""

    def __init__(self):
        self.pixels = 0

    def __call__(self, picture):
        self.pixels = max(self.pixels, picture.width * picture.height)
        return picture


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_001), (70_000, 3), (250_000, 1), (3000, 2)])
def test_a_long_picture_takes_no_more_than_another(mini, size):
    largest = Largest()
    resize, crop, *steps = mini.transform.transforms
    side = resize.size

    class Watched(CenterCrop):
        forward = staticmethod(lambda picture: crop(largest(picture)))

    watched = PictureTransform(Compose([resize, Watched(side), *steps]))
    assert watched.decoded(Image.new("RGB", size)).shape == (3, side, side)
    assert largest.pixels <= 33 * side * side
    assert mini.pictures.whole(Image.new("RGB", size)).shape == (3, side, side)


@pytest.mark.parametrize("size", [(2001, 20), (2000, 21), (20, 2003), (300, 3), (301, 3), (63, 1)])
def test_what_is_cut_off_a_long_picture_was_not_seen(mini, size):
    shades = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(shades)
    whole, cut = mini.transform(picture), mini.pictures.whole(picture)
    # the long side of the resized picture is rounded to a pixel, by which its scale differs by one in thousands
    assert (whole - cut).abs().mean() < 0.02 * whole.std()


def test_a_picture_up_to_the_bound_is_not_touched(mini):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 160, 3), np.uint8))
    assert mini.pictures._bounded(picture) is picture


def test_models_that_take_pictures_whole():
    long = Image.new("RGB", (60_000, 1))
    squash, longest = (
        PictureTransform(image_transform(32, is_train=False, resize_mode=mode)) for mode in ("squash", "longest")
    )
    assert squash.decoded(long).shape == (3, 32, 32)
    assert longest.decoded(Image.new("RGB", (320, 10))).shape == (3, 32, 32)
    for see in (longest.decoded, longest.whole):
        with pytest.raises(DataError, match="a picture of 60000 x 1 pixels is too long"):
            see(long)
    with pytest.raises(DataError, match="a picture of 33 x 1"):
        longest.whole(Image.new("RGB", (33, 1)))


def test_16_bit_pictures_are_encoded_as_their_bytes(mini):
    deep = Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64))
    stream = io.BytesIO()
    deep.save(stream, "PNG")
    found, expected = mini.encode_images([deep, decode(stream.getvalue(), "")])
    assert torch.equal(found, expected)
    crop = RandomResizedCrop.of(mini.preprocess_cfg)
    found, expected = (crop(p, torch.Generator().manual_seed(3)) for p in (deep, decode(stream.getvalue(), "")))
    assert torch.equal(found, expected)


def test_a_network_receives_bytes_pixels_and_embeddings(mini):
    network = CLIPNetwork(mini, ("cat", "dog"), ("a {}.",), TuneOptions(parameters="full"))
    bytes_, pixels = (torch.stack([make(p) for p in pictures()]) for make in (mini.pictures.decoded, mini.transform))
    assert torch.equal(network.received(bytes_), pixels)
    assert torch.equal(network.received(pixels), pixels)
    assert torch.equal(network.received(torch.ones(2, 5)), torch.ones(2, 5))


def test_what_goes_to_a_gpu_is_pinned_and_not_waited_for(monkeypatch):
    went = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: went.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: went.append((args, options)) or self)
    sent(torch.ones(2), "cuda")
    assert went == ["pinned", (("cuda",), {"non_blocking": True})]
    sent(torch.ones(2), "cpu")
    assert went[2:] == [(("cpu",), {})]


def test_products_are_fast_within_towers_on_a_gpu_alone():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with tower_products(torch.device("cpu")):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    with suppress(ValueError), tower_products(torch.device("cuda")):
        assert matmul.allow_tf32
        assert cudnn.allow_tf32
        raise ValueError
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    assert not matmul.allow_tf32  # by default, and so for S and P


def test_a_model_is_read_and_hashed_once_and_nobody_is_given_what_is_kept(monkeypatch):
    import kngd_ray.clip._model as module

    first = load_model(ModelConfig())
    monkeypatch.setattr(module, "_fingerprint", lambda *_: pytest.fail("hashed once more"))
    monkeypatch.setattr(module, "_load_weights", lambda *_: pytest.fail("read once more"))
    with torch.no_grad():
        for weight in first.network.parameters():
            weight.zero_()
    again = load_model(ModelConfig())
    assert again.fingerprint == first.fingerprint
    assert any(bool(weight.any()) for weight in again.network.parameters())
