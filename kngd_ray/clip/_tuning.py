"""Which weights of a CLIP model are trained, and how: the options, and the names that patterns select."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from kngd_ray.errors import ModelError, closest

Parameters = Literal["adapter", "lora", "norm", "full"]
Start = Literal["head", "zero_shot"]
Target = Literal["q", "k", "v", "out", "mlp", "proj", "pointwise"]
Augment = Literal["none", "random_resized_crop"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What is trained besides the adapters, on which pictures and in which precision.

    A pattern is a glob over dotted names, ``visual.transformer.resblocks.1?.*``; ``*`` crosses dots, and a
    pattern that is only the beginning of names, ``visual``, means all of them, ``visual.*``. The names are
    open_clip's: of parameters for ``full``, of layers for ``lora``. The temperature and the bias of the
    logits are never trained: they do not enter :class:`~kngd_ray.clip.CLIPNetwork`.

    Attributes:
        parameters: ``adapter`` trains only adapters, on embeddings of frozen towers; ``lora`` also low-rank
            updates of the selected layers; ``norm`` also scales and biases of the selected layers' normalisation
            (2SFS, arXiv 2503.11609, trains these before a classifier); ``full`` also all selected weights.
        start: where a fit of towers begins. ``head`` fits the adapters first, by the default preset, on the features of
            the pictures as they are, and goes on from there with adapters and towers together; ``zero_shot`` is CLIP.
        views: random crops of each picture, as `augment` draws them, that a head on frozen features learns from beside
            the picture as it is. A fit that ends at its mode sees all of them at once, and together they count as one
            picture; others see another one in each epoch. Towers start from a head that has seen them.
        refit: whether the filter fits the head of `start` again once the towers are trained, on their features of the
            shots and the crops. At an `alpha` below 1 it does not: other towers than these are served.
        include: patterns of what is trained by ``lora``, ``norm`` and ``full``.
        exclude: patterns of what is not, though included.
        rank: r of a low-rank update ``scaling * B A``, A (r, i), B (o, r); at most a layer's own width.
        scaling: factor of the low-rank update (alpha / r where that is how LoRA is written).
        targets: layers that ``lora`` updates: ``q``, ``k``, ``v`` and ``out`` projections of attention, the
            two layers of an ``mlp``, the other linear layers (``proj``), and ``pointwise`` convolutions.
        augment: how training pictures are varied.
        crop_scale: smallest and largest area of a random crop, as parts of the picture.
        precision: of the towers' activations; weights, embeddings and logits are float32 either way.
        checkpointing: recompute activations in the backward pass, which needs less memory and more time.
        alpha: weight ensembling at inference, theta_0 + alpha (theta - theta_0): 0 is where the fit began, the
            pretrained towers under the head of `start`, 1 the trained model.
    """

    parameters: Parameters = "adapter"
    start: Start = "head"
    views: int = 8
    refit: bool = True
    include: tuple[str, ...] = ("visual.*",)
    exclude: tuple[str, ...] = ("*token_embedding*", "logit_scale", "logit_bias")
    rank: int = 2
    scaling: float = 1.0
    targets: tuple[Target, ...] = ("q", "k", "v", "pointwise")
    augment: Augment = "random_resized_crop"
    crop_scale: tuple[float, float] = (0.5, 1.0)
    precision: Precision = "float32"
    checkpointing: bool = False
    alpha: float = 1.0

    def __post_init__(self) -> None:
        for name, kinds in (
            ("parameters", Parameters),
            ("start", Start),
            ("augment", Augment),
            ("precision", Precision),
        ):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(kinds))}")
        for name in ("include", "exclude", "targets"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} is {value!r}; it must be a list, such as [{value!r}]")
        if self.views < 0:
            raise ValueError(f"views is {self.views}; give 0 or more crops of each picture")
        if not self.include:
            raise ValueError("include is empty; name at least one pattern, such as 'visual.*'")
        if not self.targets:
            raise ValueError(f"targets is empty; name at least one of {', '.join(get_args(Target))}")
        if unknown := [target for target in self.targets if target not in get_args(Target)]:
            raise ValueError(f"targets has {unknown[0]!r}; each must be one of {', '.join(get_args(Target))}")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; a low-rank update needs at least rank 1")
        if not 0 < self.scaling < math.inf:
            raise ValueError(f"scaling is {self.scaling}; the factor of a low-rank update must be positive")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale is {self.crop_scale}; it must be two parts of the picture's area, 0 < smallest <= "
                "largest <= 1"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must lie in [0, 1], from pretrained to trained")

    @property
    def images(self) -> bool:
        """Whether training needs the towers: cached features no longer stand for pictures."""
        return self.parameters != "adapter"

    @property
    def after_head(self) -> bool:
        """Whether towers are trained that start where the fit of a head on frozen features ends."""
        return self.images and self.start == "head"


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is a glob of a dotted name, or of a beginning of it."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def select(names: Sequence[str], options: TuneOptions, what: str) -> list[str]:
    """The names that are included and not excluded.

    Args:
        names: dotted names of all that could be trained.
        options: with the patterns.
        what: the names are of, for messages: ``layer`` or ``weight``.

    Returns:
        The selected names in the order given.

    Raises:
        ModelError: A pattern includes nothing, or everything included is excluded.
    """
    for pattern in options.include:
        if not any(matches(name, [pattern]) for name in names):
            raise ModelError(f"tune.include: no {what} matches {pattern!r}; {_nearest(pattern, names)}")
    chosen = [name for name in names if matches(name, options.include) and not matches(name, options.exclude)]
    if not chosen:
        raise ModelError(
            f"tune.exclude: every {what} that tune.include selects is excluded by {', '.join(options.exclude)}: "
            "take a pattern out of it"
        )
    return chosen


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """The names and beginnings of names most like a pattern, for the end of a message."""
    parts = [name.split(".") for name in names]
    beginnings = dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1))
    found = closest(pattern.strip("*.?"), list(beginnings), 3, cutoff=0)
    return f"the nearest are {' or '.join(found)}" if found else "the model has none"
