"""Pictures from bytes that nobody vouches for."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kngd_ray.errors import DataError

# Pillow's other decoders are for rare formats, and one of them (EPS) runs a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_SCANS = 100  # of a progressive JPEG, which has ten or so: each pass is over the whole picture
MAX_PIXELS = 80_000_000  # 240 MB as RGB, below the size at which Pillow starts to warn


class BadImage(DataError):  # noqa: N818 - the name says it
    """A picture cannot be decoded."""


def decode(data: bytes, place: str) -> Image.Image:
    """Decode a picture to RGB, upright by its EXIF orientation, transparent parts on white.

    Args:
        data: a picture file's bytes; of an animation the first frame is taken.
        place: where the picture is, for the message.

    Returns:
        The picture, mode RGB.

    Raises:
        BadImage: when the bytes are empty, no picture, cut short, or of too many pixels.
    """
    if not data:
        raise BadImage(f"{place}: the picture is empty; replace it, or set data.on_bad_image=skip")
    try:
        return _to_rgb(_load(data))
    except Exception as error:  # decoders raise nearly any type on hostile bytes
        reason = str(error) if not isinstance(error, UnidentifiedImageError) else "no known format"
        raise BadImage(
            f"{place}: the picture cannot be decoded ({reason}); replace it, or set data.on_bad_image=skip"
        ) from error


def _load(data: bytes) -> Image.Image:
    """Decode in the picture's own mode, turned upright.

    Raises:
        ValueError: when the header announces too many pixels; none of them is decoded.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} is over {MAX_PIXELS:,} pixels")
        # a marker that cannot occur within a scan, where 0xff is followed by 0
        if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
        return ImageOps.exif_transpose(picture)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any mode to RGB."""
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow would clip to 8 bits where we want to scale
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    drawn = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
