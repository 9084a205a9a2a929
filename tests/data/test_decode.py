import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from kngd_ray.data import BadImage, decode
from kngd_ray.errors import DataError


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_formats(kind):
    picture = decode(encoded(Image.new("RGB", (3, 2), "red"), kind), "here")
    assert (picture.mode, picture.size) == ("RGB", (3, 2))
    assert np.abs(np.asarray(picture, int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_modes_become_rgb(mode):
    assert decode(encoded(Image.new(mode, (2, 2))), "here").mode == "RGB"


def test_16_bit_grey_is_scaled_not_clipped():
    picture = decode(encoded(Image.fromarray(np.full((2, 2), 0x8000, np.uint16))), "here")
    assert picture.getpixel((0, 0)) == (128, 128, 128)


def test_cmyk():
    assert decode(encoded(Image.new("CMYK", (2, 2)), "JPEG"), "here").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif), "here").size == (2, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_is_white(mode):
    clear = Image.new("P", (2, 2), 0) if mode == "P" else Image.new(mode, (2, 2))
    data = encoded(clear, **({"transparency": 0} if mode == "P" else {}))
    assert decode(data, "here").getpixel((0, 0)) == (255, 255, 255)


def bomb():
    """A PNG of 58 bytes whose header announces 10 gigapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0)
        + b"IEND"
        + struct.pack(">I", zlib.crc32(b"IEND"))
    )


def big():
    """A real picture just over the limit, small on disk."""
    return encoded(Image.new("1", (10_000, 8_001)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "the picture is empty"),
        (lambda: b"not a picture", "no known format"),
        (lambda: encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-400], "truncated"),
        (lambda: encoded(Image.effect_noise((64, 64), 50))[:-400], "cannot be decoded"),
        (lambda: encoded(Image.new("RGB", (9, 9)), "EPS"), "no known format"),
        (bomb, "decompression bomb"),
        (big, "10000 x 8001 is over 80,000,000 pixels"),
    ],
)
def test_bad_pictures(make, reason):
    with pytest.raises(BadImage, match=reason) as caught:
        decode(make(), "pacs.parquet, row 17")
    assert str(caught.value).startswith("pacs.parquet, row 17: the picture ")
    assert str(caught.value).endswith("replace it, or set data.on_bad_image=skip")
    assert isinstance(caught.value, DataError)


def test_random_damage_is_a_bad_image_or_a_picture():
    data = encoded(Image.effect_noise((32, 32), 50), "JPEG")
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 5):
            damaged[place] = rng.integers(256)
        with suppress(BadImage):
            assert decode(bytes(damaged), "here").mode == "RGB"
