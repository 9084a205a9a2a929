"""Crops that a head on frozen features learns from in addition to each picture.

A crop says nothing of the labels that its picture does not say. What it says is which features of a picture do not
matter to its label: a head that has seen crops is not surprised by them, nor by other pictures. A step to the mode sees
all views of a picture at once and counts them as one (:func:`~kngd_ray.training.options.counted_once`); other methods
see another view in each epoch.
"""

from kngd_ray.clip import AnyModel, ClipModel, augmentation_of
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
        How to make them; None where the fit sees none: of features there are no crops, one pass of minibatches sees the
        pictures as they are, and towers that start without a fitted head crop the pictures themselves.
    """
    tune = options.tune
    if not pictures or not isinstance(model, ClipModel) or (tune.images and tune.start != "head"):
        return None
    if not (tune.images or options.at_mode or options.epochs > 1):
        return None
    crop, count = augmentation_of(model.preprocess_cfg, tune), min(tune.views, _MOST // pictures - 1)
    return None if crop is None or count < 1 else Crops(count, crop.drawn, repr(crop))
