import io
import struct
import zlib
from contextlib import suppress
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from kngd_ray.data import BadImage, decode, picture_of
from kngd_ray.errors import DataError


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
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


RAMP = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)  # 0 to 65,520: all of 16 bits
SHADES = RAMP >> 8


def tiff(bits, kind, pixels, white=1):
    """A TIFF of one grey channel that Pillow does not write: of whole numbers (1), signed ones (2) or floats (3)."""
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 0, 277: 1, 278: height, 339: kind}
    tags |= {273: 8 + 2 + 12 * (len(tags) + 1) + 4, 279: pixels.nbytes}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels.tobytes()


def grey(given):
    picture = picture_of(given, "here")
    assert picture.mode == "RGB"
    assert picture.info == {}
    return np.asarray(picture, int)[:, :, 0]


DEEP = {
    "16-bit PNG": encoded(Image.fromarray(RAMP)),
    "16-bit TIFF": encoded(Image.fromarray(RAMP), "TIFF"),
    "16-bit JPEG 2000": encoded(Image.fromarray(RAMP), "JPEG2000"),
    "16-bit PGM": b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes(),
    "16-bit PPM": b"P6 64 64 65535\n" + np.stack([RAMP] * 3, 2).astype(">u2").tobytes(),
    "12-bit PGM, which says so": b"P5 64 64 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
    "32-bit TIFF": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "TIFF of floats": encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    "PFM": b"Pf\n64 64\n-1.0\n" + (RAMP[::-1] / 65535).astype("<f4").tobytes(),
    "TIFF in which zero is white": tiff(16, 1, 65535 - RAMP, white=0),
    "PIL, 16 bits": Image.fromarray(RAMP),
    "PIL, 16 bits, most significant byte first": Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes()),
    "PIL, 32 bits": Image.fromarray(RAMP.astype(np.int32)),
    "PIL, floats": Image.fromarray((RAMP / 65535).astype(np.float32)),
    "uint16": RAMP,
    "uint16, big-endian": RAMP.astype(">u2"),
    "int64": RAMP.astype(np.int64),
    "float64": RAMP / 65535,
    "float32, colour": np.stack([RAMP / 65535] * 3, 2).astype(np.float32),
    "uint8": SHADES.astype(np.uint8),
    "a list": (RAMP / 65535).tolist(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_scaled_by_their_range(kind):
    assert np.abs(grey(DEEP[kind]) - SHADES).max() <= 1


UNKNOWN = {
    "12 bits of 16": (RAMP >> 4, "16 bits end at 4095 of 65,535"),
    "12 bits of 16 in a PNG": (encoded(Image.fromarray(RAMP >> 4)), "16 bits end at 4095 of 65,535"),
    "8 bits of 16": (encoded(Image.fromarray(RAMP >> 8), "TIFF"), "16 bits end at 255, as those of 8 bits do"),
    "8 bits of 64": (SHADES.astype(np.int64), "64 bits end at 255, as those of 8 bits do"),
    "a list of whole numbers": (SHADES.tolist(), "64 bits end at 255, as those of 8 bits do"),
    "PIL, 8 bits of 32": (Image.fromarray(SHADES.astype(np.int32)), "32 bits end at 255, as those of 8 bits do"),
    "14 bits of 16": (RAMP >> 2, "16 bits end at 16380 of 65,535, where those of 14 bits do"),
    "14 bits of 16 in a PNG": (encoded(Image.fromarray(RAMP >> 2)), "16 bits end at 16380 of 65,535"),
    "14 bits of 32": ((RAMP >> 2).astype(np.int32), "32 bits end at 16380 of 65,535"),
    "int8": (
        (SHADES // 2).astype(np.int8),
        "its numbers are int8, whose white is not known, and end at 127: give uint8",
    ),
    "a mask": ((SHADES > 99).astype(np.uint8), "numbers are uint8 and all 0 or 1, .* or give a mask as booleans"),
    "a mask of 32 bits": ((SHADES > 99).astype(np.int32), "its numbers are int32 and all 0 or 1"),
    "colours of 0 and 1": (np.stack([SHADES > 99] * 3, 2).astype(np.uint8), "numbers are uint8 and all 0 or 1"),
    "opaque colours of 0 and 1": (
        np.stack([SHADES > 99] * 3 + [255 * np.ones_like(SHADES)], 2).astype(np.uint8),
        "numbers are uint8 and all 0 or 1",
    ),
    "32 bits": (tiff(32, 1, RAMP.astype(np.uint32) << 15), "between 0 and 2146959360"),
    "below zero": (tiff(16, 2, RAMP.astype(np.int16)), "between -32768 and 32752"),
    "floats up to 255": (RAMP / 257, "floats lie between 0 and 254.9"),
    "PIL, floats up to 255": (Image.fromarray((RAMP / 257).astype(np.float32)), "floats lie between 0 and 254.9"),
    "floats around 0": (RAMP / 65535 - 0.5, "floats lie between -0.5 and 0.4"),
    "next to nothing": (RAMP / 65535 / 300, "floats end at 0.003"),
    "NaN": (np.where(RAMP > 9, RAMP / 65535, np.nan), "NaN or infinite"),
    "infinity": (np.where(RAMP > 9, RAMP / 65535, np.inf), "NaN or infinite"),
    "a TIFF of half floats": (tiff(16, 3, (RAMP / 65535).astype(np.float16)), "a TIFF of a kind that Pillow does not"),
    "a TIFF of doubles": (tiff(64, 3, RAMP / 65535), "a TIFF of a kind that Pillow does not"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_has_no_known_range_is_refused(kind):
    given, reason = UNKNOWN[kind]
    with pytest.raises(BadImage, match=reason) as caught:
        picture_of(given, "row 3")
    assert str(caught.value).startswith("row 3: the picture cannot be decoded (")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.float32, bool])
def test_black_is_black(dtype):
    black = np.zeros((64, 64), dtype)
    assert grey(black).max() == 0
    assert grey(np.stack([black] * 3, 2)).max() == 0


def test_what_is_merely_dark_passes():
    """Night in sixteen bits, and the noise of a closed shutter in a file of eight."""
    assert grey(RAMP >> 3).max() == 31
    assert grey((RAMP * 0.2).astype(np.uint16)).max() == 51
    assert grey((RAMP * 0.3).astype(np.uint16)).max() == 76
    assert grey((SHADES > 99).astype(np.uint8) * np.uint8(2)).max() == 2
    assert grey(encoded(Image.fromarray((SHADES > 99).astype(np.uint8)))).max() == 1


def png_of_16_bits(values, colour):
    """A PNG of 16 bits, (H, W, channels), which Pillow does not write; colour 2 is RGB, 4 grey and opacity, 6 RGBA."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in [*parts, (b"IEND", b"")]
    )


@pytest.mark.parametrize(("colour", "opaque", "channels"), [(2, 0, 3), (4, 1, 1), (6, 1, 3)])
def test_16_bits_of_colour(colour, opaque, channels):
    def data(bits):
        opacity = [np.full((64, 64), 65535, np.uint16)] * opaque
        return png_of_16_bits(np.stack([RAMP >> bits] * channels + opacity, 2), colour)

    assert np.abs(grey(data(0)) - SHADES).max() <= 1
    for bits in (4, 8):
        for given in (data(bits), Image.open(io.BytesIO(data(bits)))):
            with pytest.raises(BadImage, match="of its numbers of 16 bits the upper four are empty"):
                picture_of(given, "here")
    with pytest.raises(BadImage, match="its numbers of 16 bits end where those of 14 bits do"):
        picture_of(data(2), "here")
    assert grey(data(3)).max() == 31


@pytest.mark.parametrize("bits", [4, 8])
def test_16_bits_of_colour_in_a_pixmap(bits):
    pixels = np.stack([RAMP >> bits] * 3, 2).astype(">u2")
    with pytest.raises(BadImage, match="of its numbers of 16 bits the upper four are empty"):
        decode(b"P6 64 64 65535\n" + pixels.tobytes(), "here")
    assert decode(b"P6 64 64 255\n" + bytes(3 * 64 * 64), "here").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (np.zeros((3, 64, 64), np.uint8), r"shape \(3, 64, 64\): channels come last, give transpose\(1, 2, 0\) of it"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\): a picture has"),
        (np.zeros((8, 8, 5), np.uint8), r"shape \(8, 8, 5\): a picture has"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\): a picture has"),
        (np.zeros(5), "float64 of shape \\(5,\\): give a PIL picture"),
        (np.zeros((3, 3), complex), "of type ndarray: give a PIL picture"),
        (None, "of type NoneType: give a PIL picture"),
        ({"bytes": None, "path": None}, "of type NoneType: give a PIL picture"),
        ([[1, 2], [3]], "list is no array"),
        (Image.new("RGB", (0, 5)), "it has 0 x 5 pixels"),
        (Image.new("1", (10_000, 8_001)), "over 80,000,000 pixels"),
    ],
)
def test_what_is_no_picture(given, sentence):
    with pytest.raises(BadImage, match=sentence):
        picture_of(given, "picture 4")


def test_a_file_that_is_not_there(tmp_path):
    for given in (tmp_path / "no.png", {"bytes": None, "path": str(tmp_path / "no.png")}):
        with pytest.raises(DataError, match=r"picture 4: the file .*no\.png cannot be read \(No such file"):
            picture_of(given, "picture 4")


def test_every_door_gives_the_same_picture(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 9, 4), np.uint8)
    pictures = [Image.fromarray(colours), Image.fromarray(colours[:, :, :3]), Image.fromarray(colours[:, :, 0])]
    pictures += [pictures[1].convert(mode) for mode in ("P", "LA", "1", "PA")]
    for picture in pictures:
        data = encoded(picture.convert("RGBA") if picture.mode == "PA" else picture)
        file = tmp_path / "x.png"
        file.write_bytes(data)
        given = [data, bytearray(data), file, str(file), io.BytesIO(data), {"bytes": data, "path": "x"}, picture]
        given += [{"bytes": None, "path": str(file)}, Image.open(file)]
        if picture.mode not in {"P", "PA"}:  # an array has no palette
            given.append(np.asarray(picture))
        for each in given:
            assert np.array_equal(np.asarray(picture_of(each, "")), np.asarray(decode(data, ""))), (picture.mode, each)


def test_cmyk():
    assert decode(encoded(Image.new("CMYK", (2, 2)), "JPEG"), "here").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif), "here").size == (2, 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_the_same_at_every_door(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shades = np.zeros((16, 32, 3), np.uint8)
    shades[:8, :8] = 255  # in a corner
    data = encoded(Image.fromarray(shades), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = np.asarray(decode(data, ""), int)
    rows, columns = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[
        orientation
    ]
    assert upright[rows, columns].min() > 200
    assert upright.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    assert (upright > 128).mean() == 1 / 8
    opened = Image.open(io.BytesIO(data))
    for picture in (opened, opened.convert("RGB"), picture_of(opened, "")):
        assert np.array_equal(np.asarray(picture_of(picture, "")), upright)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbagegarbage",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0",  # more entries than there are
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\x01\0\0\0\xf0\xf0\0\0\0\0\0\0",  # a value that is elsewhere
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x026\0\0\0\0\0\0\0",  # orientation as text
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_is_passed_over(kind, exif):
    data = encoded(Image.new("RGB", (4, 2), "red"), kind, exif=exif)
    for given in (data, Image.open(io.BytesIO(data))):
        assert picture_of(given, "").size == (4, 2)


def test_pages_of_a_tiff():
    page = Image.new("L", (9, 9), 7)
    with pytest.raises(BadImage, match="a TIFF of several pages of one size"):
        decode(encoded(page, "TIFF", save_all=True, append_images=[page]), "here")
    thumbnail = page.resize((3, 3))
    assert decode(encoded(page, "TIFF", save_all=True, append_images=[thumbnail]), "here").size == (9, 9)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert decode(data, "").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif():
    assert decode(encoded(Image.new("RGB", (8, 6), "red"), "AVIF"), "here").size == (8, 6)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_heic_names_the_package_that_reads_it():
    with pytest.raises(BadImage, match=r"HEIC, which the package pillow-heif reads: pip install 'kngd_ray\[heif\]'"):
        decode(HEIC, "here")


def test_heic():
    heif = pytest.importorskip("pillow_heif", reason="the extra heif is not installed")
    heif.register_heif_opener()
    assert decode(encoded(Image.new("RGB", (64, 32), "red"), "HEIF"), "here").size == (64, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_is_white(mode):
    clear = Image.new("P", (2, 2), 0) if mode == "P" else Image.new(mode, (2, 2))
    data = encoded(clear, **({"transparency": 0} if mode == "P" else {}))
    assert decode(data, "here").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_shade_of_few_bits_that_is_transparent(bits):
    # black, white, and a shade between them that says where the picture is clear, as optimisers of PNG write icons
    pixels = 1 << (8 - bits) | ((1 << bits) - 1) << (8 - 2 * bits)
    parts = {b"IHDR": struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0), b"tRNS": struct.pack(">H", 1)}
    parts |= {b"IDAT": zlib.compress(bytes([0, pixels])), b"IEND": b""}
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts.items()]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    assert np.asarray(decode(data, "here"))[0, :, 0].tolist() == [255, 255]
    clear = Image.open(io.BytesIO(data.replace(chunks[1], b"")))
    assert np.asarray(picture_of(clear, "here"))[0, :, 0].tolist() == [255 // ((1 << bits) - 1), 255]
    opened = Image.open(io.BytesIO(data))
    picture_of(opened, "here")
    assert opened.info["transparency"] == 1  # what is given is not changed


def test_profiles_of_colour_are_not_applied():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
    assert swapped != profile
    data = encoded(Image.new("RGB", (2, 2), "red"), icc_profile=swapped)
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == swapped
    assert decode(data, "here").getpixel((0, 0)) == (255, 0, 0)


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
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run git lfs pull"),
        (lambda: b"\n<!DOCTYPE html><html>", "a web page"),
        (lambda: b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
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
