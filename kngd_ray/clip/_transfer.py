"""Pictures on their way to a tower, and the tower's products: as cheap as a GPU makes them.

Decoded pictures are bytes. They travel as such, a quarter of the size of float32, and are normalised where the tower
is ::

    file --decode, resize, crop--> uint8 (3, H, W) --stack, pin--> device --normalise--> float32 (m, 3, H, W)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kngd_ray.errors import DataError

LONGEST = 32
"""Short sides of a picture that are resized along its long one: what lies beyond is cropped off anyway."""


class PictureTransform:
    """A transform of pictures in two parts: to bytes, and from bytes to what the image tower takes.

    The same numbers, bit for bit, as by the transform as a whole. One that does not end by scaling to [0, 1] and
    normalising stays whole: the first part is all of it, and the second nothing.

    Args:
        transform: turns an RGB picture into (3, H, W) float32.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        # a second of import, which only pictures are to wait for
        from torchvision.transforms import Compose, Normalize, ToTensor  # type: ignore[import-untyped]

        self._transform = transform
        self._longest, self._pads = _sides(transform)
        self._steps: Sequence[Any] | None = None
        self._mean = self._std = torch.zeros(0)
        steps = list(transform.transforms) if isinstance(transform, Compose) else []
        if len(steps) > 1 and isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize):
            self._steps = steps[:-2]
            self._mean, self._std = (torch.tensor(numbers) for numbers in (steps[-1].mean, steps[-1].std))

    def whole(self, picture: Image.Image) -> Tensor:
        """Both parts of one picture.

        Args:
            picture: in RGB.

        Returns:
            (3, H, W) float32, as the tower takes it.
        """
        return self._transform(self._bounded(picture))

    def decoded(self, picture: Image.Image) -> Tensor:
        """A picture before it is normalised.

        Args:
            picture: in RGB.

        Returns:
            (3, H, W) uint8; of a transform that stays whole float32, as the tower takes it.
        """
        if self._steps is None:
            return self.whole(picture)
        picture = self._bounded(picture)
        for step in self._steps:
            picture = step(picture)
        return pixels_of(picture)

    def normalised(self, pixels: Tensor) -> Tensor:
        """What the image tower takes, where the pixels are.

        Args:
            pixels: (m, 3, H, W) of :meth:`decoded`.

        Returns:
            (m, 3, H, W) float32; what is not bytes as it is.
        """
        return pixels if pixels.dtype != torch.uint8 else normalised(pixels, self._mean, self._std)

    def _bounded(self, picture: Image.Image) -> Image.Image:
        """Crop the ends of a very long picture, whose resized copy would be far larger than its crop.

        Raises:
            DataError: the picture is to be seen as a whole, and would have no height or width left.
        """
        short, long = sorted(picture.size)
        if self._pads and long > self._pads * short:
            raise DataError(
                f"a picture of {picture.width} x {picture.height} pixels is too long for a model that takes pictures "
                "whole: crop it"
            )
        if not self._longest or long <= self._longest * short:
            return picture
        # as far from the middle on both sides as the picture itself, or all that is kept would move by half a pixel
        kept = self._longest * short + (long - self._longest * short) % 2
        start = (long - kept) // 2
        along = picture.width == long
        return picture.crop((start, 0, start + kept, short) if along else (0, start, short, start + kept))


def _sides(transform: Callable[[Image.Image], Tensor]) -> tuple[int, int]:
    """How long pictures may be that a transform resizes, in short sides, or 0 for any.

    Returns:
        The bound where the short side is brought to a size and the middle cropped out; and that where the long side is,
        beyond which nothing is left of the short one.
    """
    from open_clip.transform import ResizeKeepRatio
    from torchvision.transforms import CenterCrop, Compose, Resize

    steps = list(transform.transforms) if isinstance(transform, Compose) else []
    for step, following in pairwise(steps):
        if isinstance(step, ResizeKeepRatio) and step.longest == 1:
            return 0, min(step.size)
        by_short = (isinstance(step, Resize) and isinstance(step.size, int)) or isinstance(step, ResizeKeepRatio)
        if by_short and isinstance(following, CenterCrop):
            return LONGEST, 0
    return 0, 0


def pixels_of(picture: Image.Image) -> Tensor:
    """The bytes of an RGB picture (3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bytes scaled to [0, 1], less a mean, over a standard deviation.

    Args:
        pixels: (..., 3, H, W) uint8.
        mean: (3,) of each channel.
        std: (3,) likewise.

    Returns:
        (..., 3, H, W) float32, where the pixels are.
    """
    mean, std = (numbers.to(pixels.device, torch.float32).view(3, 1, 1) for numbers in (mean, std))
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def best_device() -> str:
    """The default device: this machine's GPU, if there is one.

    Returns:
        ``cuda`` or ``cpu``.
    """
    return "cuda" if torch.cuda.is_available() else "cpu"


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on another device; to a GPU it goes while the CPU goes on.

    Args:
        x: on any device.
        device: where it goes.

    Returns:
        The tensor there.
    """
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def channels_last(images: Tensor) -> Tensor:
    """Lay pictures out for the image tower, with a place's channels side by side.

    Convolutions by depth are twice as fast then, forward and backward, and a whole tower of them takes a fifth less.

    Args:
        images: (m, 3, H, W), or of another shape, which stay as they are.

    Returns:
        The same numbers.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


@contextmanager
def tower_products(device: torch.device) -> Iterator[None]:
    """Products of towers in float32 on a GPU's tensor cores (TF32): ten bits of mantissa, at many times the speed.

    For towers alone, forward and backward. What a filter makes of their derivatives, S and P, stays in full precision.

    Args:
        device: where the towers are.

    Yields:
        Nothing.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
