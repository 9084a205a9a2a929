import numpy as np
import pytest

from kngd_ray.data import (
    BadImage,
    Crops,
    DataConfig,
    FeatureCache,
    content_key,
    decode,
    encode_batch,
    encode_missing,
    open_images,
)
from kngd_ray.errors import DataError

DIM = 3


def encoder(pictures):
    return np.stack([np.asarray(picture, np.float32).mean((0, 1)) for picture in pictures])


class Counting:
    def __init__(self, fail_at=None):
        self.sizes = []
        self.fail_at = fail_at

    def __call__(self, pictures):
        self.sizes.append(len(pictures))
        if self.fail_at is not None and sum(self.sizes) >= self.fail_at:
            raise KeyboardInterrupt
        return encoder(pictures)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache", "m", DIM)


def opened(path):
    return open_images(DataConfig(path=str(path)))


def test_encode_batch(png):
    blobs = [png(0), b"broken", png(1)]
    keys, features, bad = encode_batch(blobs, ["a", "b", "c"], encoder)
    assert keys.tolist() == [content_key(png(0)), content_key(png(1))]
    assert features.dtype == np.float32
    assert features.tolist() == encoder([decode(png(n), "") for n in (0, 1)]).tolist()
    assert list(bad) == [1]
    assert str(bad[1]).startswith("b: ")


def test_encode_batch_of_bad_pictures_only():
    keys, features, bad = encode_batch([b"", b"x"], ["a", "b"], Counting(fail_at=0))
    assert (len(keys), features.shape, len(bad)) == (0, (0, 0), 2)


def test_only_missing_pictures_are_encoded(pets, png, cache):
    images, count, seen = opened(pets), Counting(), []
    assert encode_missing(images, [5, 3, 5], cache, count) == frozenset()
    indices = range(20)
    encode_missing(images, indices, cache, count, batch_size=8, progress=lambda *at: seen.append(at))
    assert count.sizes == [2, 8, 8, 2]
    assert seen == [(8, 18), (16, 18), (18, 18)]
    encode_missing(images, indices, cache, count)
    assert len(count.sizes) == 4
    expected = encoder([decode(png(n), "") for n in indices])
    assert cache.read(images.keys[:20]).tolist() == expected.tolist()


def test_copies_are_encoded_once(write_parquet, png, cache):
    count = Counting()
    images = opened(write_parquet(image=[png(0), png(1), png(0)], label=["a", "b", "a"]))
    encode_missing(images, range(3), cache, count)
    assert count.sizes == [2]
    assert cache.read(images.keys)[0].tolist() == cache.read(images.keys)[2].tolist()


def test_changed_pictures_and_models_are_encoded_again(write_folder, png, tmp_path, cache):
    root = write_folder("a/0.png", "b/1.png")
    encode_missing(opened(root), range(2), cache, encoder)
    (root / "a" / "0.png").write_bytes(png(9))
    changed, count = opened(root), Counting()
    encode_missing(changed, range(2), cache, count)
    assert count.sizes == [1]
    assert cache.read(changed.keys)[0].tolist() == encoder([decode(png(9), "")])[0].tolist()
    encode_missing(changed, range(2), FeatureCache(tmp_path / "cache", "n", DIM), count)
    assert count.sizes == [1, 2]


def test_picture_changed_while_in_use(write_folder, png, cache):
    root = write_folder("a/0.png", "b/1.png")
    images = opened(root)
    (root / "b" / "1.png").write_bytes(png(9))
    with pytest.raises(DataError, match=r"b/1\.png changed while it was in use: run again"):
        encode_missing(images, range(2), cache, encoder)


def test_damaged_part_is_encoded_again(pets, tmp_path, cache):
    images, count = opened(pets), Counting()
    encode_missing(images, range(4), cache, encoder)
    before = cache.read(images.keys[:4])
    (part,) = (tmp_path / "cache" / "m").iterdir()
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)
    again = FeatureCache(tmp_path / "cache", "m", DIM)
    encode_missing(images, range(4), again, count)
    assert count.sizes == [4]
    assert again.read(images.keys[:4]).tolist() == before.tolist()


@pytest.fixture
def spoilt(write_parquet, png):
    pictures = [png(0), b"broken", png(1), b"broken", png(2)]
    return opened(write_parquet(image=pictures, label=["a", "b", "a", "b", "a"]))


def test_bad_pictures_are_skipped_every_time(spoilt, cache):
    for _ in range(2):
        bad = encode_missing(spoilt, [0, 1, 2, 3], cache, encoder, on_bad_image="skip")
        assert bad == {1, 3}
        assert all(type(index) is int for index in bad)
    assert cache.read(spoilt.keys[[0, 2]]).shape == (2, DIM)


def test_bad_picture_stops_after_the_others_are_written(spoilt, cache):
    with pytest.raises(BadImage, match=r"set\.parquet, row 1: the picture cannot be decoded"):
        encode_missing(spoilt, range(5), cache, encoder, batch_size=3)
    assert cache.missing(spoilt.keys) == {spoilt.keys[1], spoilt.keys[4]}


def test_interrupted_work_is_kept(pets, cache):
    images = opened(pets)
    with pytest.raises(KeyboardInterrupt):
        encode_missing(images, range(36), cache, Counting(fail_at=25), batch_size=8)
    assert len(cache.missing(images.keys)) == 36 - 24


def test_parts_are_written_on_the_way(pets, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("kngd_ray.data._encode.PART_ROWS", 10)
    encode_missing(opened(pets), range(36), cache, encoder, batch_size=5)
    assert len(list((tmp_path / "cache" / "m").iterdir())) == 4


def test_feature_that_is_not_finite_names_the_picture(spoilt, cache):
    def broken(pictures):
        features = encoder(pictures)
        features[1] = np.nan
        return features

    with pytest.raises(DataError, match=r"set\.parquet, row 2: the model's feature is not finite"):
        encode_missing(spoilt, range(5), cache, broken, on_bad_image="skip")
    assert len(cache.missing(spoilt.keys)) == 4


def halved(picture, seed):
    """A crop that is drawn by the seed."""
    left = seed % (picture.width // 2)
    return picture.crop((left, 0, left + picture.width // 2, picture.height))


def test_crops_have_keys_of_their_own(pets, cache):
    """Each a function of the picture's bytes, the way to crop and its number: more of them keep the first ones."""
    images, crops = opened(pets), Crops(3, halved, "halves")
    everything = range(len(images))
    assert encode_missing(images, everything, cache, encoder) == frozenset()
    keys = crops.keys(images.keys)
    assert keys.shape == (len(images), 3)
    assert len({*keys.ravel().tolist(), *images.keys.tolist()}) == 4 * len(set(images.keys.tolist()))
    assert cache.missing(keys.ravel()) == {*keys.ravel().tolist()}
    first = Counting()
    assert encode_missing(images, everything, cache, first, crops=crops) == frozenset()
    assert not cache.missing(keys.ravel())
    blob = dict(images.read(np.array([1])))[1]
    drawn = crops.of(decode(blob, ""), images.keys[1])
    assert cache.read(keys[1]).tolist() == encoder(drawn).tolist()
    again = Counting()
    encode_missing(images, everything, cache, again, crops=crops)
    assert again.sizes == []
    more = Crops(5, halved, "halves")
    assert more.keys(images.keys)[:, :3].tolist() == keys.tolist()
    encode_missing(images, everything, cache, again, crops=more)
    assert not cache.missing(more.keys(images.keys).ravel())
    assert not set(Crops(3, halved, "thirds").keys(images.keys).ravel().tolist()) & set(keys.ravel().tolist())


def test_a_batch_of_crops_without_the_pictures_that_are_broken(png):
    crops = Crops(2, halved, "halves")
    keys, features, bad = encode_batch([png(0), b"broken", png(1)], ["a", "b", "c"], encoder, crops)
    assert keys.tolist() == crops.keys(np.array([content_key(png(0)), content_key(png(1))])).ravel().tolist()
    assert features.shape == (4, DIM)
    assert list(bad) == [1]
