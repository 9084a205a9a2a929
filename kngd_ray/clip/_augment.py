"""The one augmentation of training pictures: a random crop, resized to what the image tower takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kngd_ray._rgb import to_rgb
from kngd_ray.clip._transfer import normalised, pixels_of
from kngd_ray.clip._tuning import TuneOptions

_TRIES = 10
_MODES = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}  # the last as open_clip reads it


@dataclass(frozen=True)
class RandomResizedCrop:
    """A crop of random area and aspect ratio, resized and normalised: torchvision's, with a generator of its own.

    torchvision's class draws from the global generator, which threads share: here the crop is a function of the
    picture and of the generator that comes with it. No flips and no colours: left and right, and colour, are what
    many prompts are about.

    Attributes:
        size: height and width of the result.
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        interpolation: `bicubic` or `bilinear`; open_clip's `random` is `bicubic`.
        scale: least and greatest part of the picture's area.
        ratio: least and greatest width over height of the crop.

    Raises:
        ValueError: when a field is out of its range.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {self.size}: it must be a height and a width of 1 or more")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean is {self.mean} and std {self.std}: three numbers each, std above 0")
        if self.interpolation not in _MODES:
            raise ValueError(f"interpolation is {self.interpolation!r}: it must be one of {', '.join(_MODES)}")
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(
                f"scale is {self.scale}: the least and the greatest area must lie in (0, 1], in this order"
            )
        if not 0.0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio is {self.ratio}: the least and the greatest ratio must be above 0, in this order")

    @classmethod
    def of(cls, preprocess_cfg: Mapping[str, Any], scale: tuple[float, float] = (0.5, 1.0)) -> "RandomResizedCrop":
        """The crop that fits a model.

        Args:
            preprocess_cfg: open_clip's: size, mean, std and interpolation. How it resizes and fills whole pictures does
                not matter to a crop.
            scale: least and greatest part of the picture's area.

        Returns:
            The augmentation.
        """
        size, mean, std = (preprocess_cfg[key] for key in ("size", "mean", "std"))
        return cls(
            size=(size, size) if isinstance(size, int) else tuple(size),
            mean=(mean,) * 3 if isinstance(mean, float | int) else tuple(mean),
            std=(std,) * 3 if isinstance(std, float | int) else tuple(std),
            interpolation=preprocess_cfg.get("interpolation") or "bicubic",
            scale=scale,
        )

    def __call__(self, picture: Image.Image, generator: torch.Generator) -> Tensor:
        """Augment one picture.

        Args:
            picture: a picture of any size and mode.
            generator: on the CPU; the crop is drawn from it.

        Returns:
            Pixels (3, H, W), float32, normalised.
        """
        return normalised(self.crop(picture, generator), torch.tensor(self.mean), torch.tensor(self.std))

    def crop(self, picture: Image.Image, generator: torch.Generator) -> Tensor:
        """Augment one picture, and leave it to others to normalise it.

        Args:
            picture: a picture of any size and mode.
            generator: on the CPU; the crop is drawn from it.

        Returns:
            Pixels (3, H, W), uint8.
        """
        return pixels_of(self._cropped(picture, generator))

    def drawn(self, picture: Image.Image, seed: int) -> Image.Image:
        """A crop of one picture as a picture, of which the model's own transform leaves nothing to do but normalise it.

        Args:
            picture: a picture of any size and mode.
            seed: of the generator.

        Returns:
            The crop, RGB, of the size that the model takes.
        """
        return self._cropped(picture, torch.Generator().manual_seed(seed))

    def _cropped(self, picture: Image.Image, generator: torch.Generator) -> Image.Image:
        # a second of import, which only training on pictures is to wait for
        import torchvision.transforms.functional as pixels  # type: ignore[import-untyped]

        mode = pixels.InterpolationMode(_MODES[self.interpolation])
        top, left, height, width = self.box(picture.width, picture.height, generator)
        cropped: Image.Image = pixels.resized_crop(to_rgb(picture), top, left, height, width, list(self.size), mode)
        return cropped

    def box(self, width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """Draw a crop; torchvision's steps, so that equal seeds draw equal crops.

        Args:
            width: of the picture.
            height: of the picture.
            generator: on the CPU.

        Returns:
            Top, left, height and width.
        """

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(1).uniform_(low, high, generator=generator)

        def below(end: int) -> int:
            return int(torch.randint(0, end, (1,), generator=generator).item())

        # logarithms in float32, as torchvision takes them
        least, greatest = torch.log(torch.tensor(self.ratio)).tolist()
        for _ in range(_TRIES):
            area = width * height * uniform(*self.scale).item()
            ratio = torch.exp(uniform(least, greatest)).item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return below(height - h + 1), below(width - w + 1), h, w
        # a picture too long or too tall for its crops: the largest central one of an allowed ratio
        w, h = width, height
        if width / height < self.ratio[0]:
            h = max(1, round(w / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = max(1, round(h * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w


def augmentation_of(preprocess_cfg: Mapping[str, Any], options: TuneOptions) -> RandomResizedCrop | None:
    """How training pictures of a model are varied.

    Args:
        preprocess_cfg: open_clip's, of the model.
        options: ``augment`` and ``crop_scale``.

    Returns:
        The augmentation; None leaves pictures as they are.
    """
    return None if options.augment == "none" else RandomResizedCrop.of(preprocess_cfg, options.crop_scale)
