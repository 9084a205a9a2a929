"""Crops that a head on frozen features learns from in addition to each picture.

A crop says nothing about the labels that its picture does not say. What it says is which features of a picture do not
matter to its label: a head that has seen crops is not surprised by them, nor by other pictures. A step to the mode sees
all views of a picture at once and counts them as one (:func:`~kngd_ray.training.options.counted_once`); other methods
see a different view in each epoch.
"""

from kngd_ray.clip import AnyModel, ClipModel, CLIPNetwork, TuneOptions, augmentation_of
from kngd_ray.data import Crops
from kngd_ray.training.options import FitOptions

_MOST = 1 << 14  # samples of a fit: of more pictures there are fewer views


def crops_of(options: FitOptions, model: AnyModel, pictures: int) -> Crops | None:
    """The crops that a fit asks for.

    Args:
        options: of the fit.
        model: the pretrained model that encodes them.
        pictures: of the largest support set.

    Returns:
        How to make them; None where the fit sees none, or there are no pictures to make them of.
    """
    count = views_of(options, pictures)
    return drawn(model, options.tune, count) if count and isinstance(model, ClipModel) else None


def views_of(options: FitOptions, pictures: int) -> int:
    """How many crops of each picture a fit asks for.

    Args:
        options: of the fit.
        pictures: of the largest support set.

    Returns:
        V; 0 where the fit sees none: one pass of minibatches sees the pictures as they are, and towers that start
        without a fitted head crop the pictures themselves.
    """
    tune = options.tune
    if not pictures or tune.augment == "none" or (tune.images and not tune.after_head):
        return 0
    if not (tune.images or options.at_mode or options.epochs > 1):
        return 0
    return max(0, min(tune.views, _MOST // pictures - 1))


def drawn(model: ClipModel | CLIPNetwork, tune: TuneOptions, count: int) -> Crops | None:
    """Crops as a model takes them.

    Args:
        model: encodes them.
        tune: how they are drawn.
        count: V, of each picture.

    Returns:
        How to make them; None where pictures are left as they are.
    """
    crop = augmentation_of(model.preprocess_cfg, tune)
    return None if crop is None else Crops(count, crop.drawn, repr(crop))
