"""What of two towers is trained, and with how much memory."""

from contextlib import suppress
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kngd_ray.clip import lora
from kngd_ray.clip._model import quiet_open_clip
from kngd_ray.clip._tuning import TuneOptions, select
from kngd_ray.errors import ModelError

_NEVER_TRAINED = ("logit_scale", "logit_bias")  # they do not enter the network's logits
_NORMALISATION = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)
_BY_NAME = ("LayerNorm2d", "RmsNorm", "FrozenBatchNorm2d")  # of timm, where they are not subclasses of torch's
_CUSTOM_BLOCK = "CustomResidualAttentionBlock"


def choose(clip: Any, options: TuneOptions, seed: int) -> list[str]:
    """Make the selected weights of a frozen model trainable.

    Args:
        clip: an open_clip model, which is changed.
        options: what is selected.
        seed: of the random factors of LoRA.

    Returns:
        Names of the layers that LoRA has adapted.

    Raises:
        ModelError: Nothing in the model is what is to be trained.
    """
    if options.parameters == "lora":
        return lora.inject(clip, options, seed)
    if options.parameters in ("full", "norm"):
        weights = dict(clip.named_parameters())
        known = [name for name in weights if name not in _NEVER_TRAINED]
        what = "weight"
        if options.parameters == "norm":
            inside = normalising(clip)
            known, what = [name for name in known if name.rpartition(".")[0] in inside], "weight of a normalisation"
            if not known:
                raise ModelError(
                    "tune.parameters is norm, and the model has no normalisation with weights: set it to lora or full"
                )
        for name in select(known, options, what):
            weights[name].requires_grad_(True)
    return []


def normalising(clip: Any) -> set[str]:
    """Names of the layers that normalise, and then scale and shift.

    Args:
        clip: an open_clip model.

    Returns:
        Of layer, batch, group and root-mean-square normalisation, timm's own classes of them too.
    """
    return {
        name
        for name, module in clip.named_modules()
        if isinstance(module, _NORMALISATION) or any(kind.__name__ in _BY_NAME for kind in type(module).__mro__)
    }


def recompute(clip: Any, name: str, *, image: bool, text: bool) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    Args:
        clip: an open_clip model, which is changed.
        name: of the model, for the message.
        image: whether the image tower has to.
        text: whether the text tower has to.

    Raises:
        ModelError: A tower that has to cannot.
    """
    with quiet_open_clip(), suppress(AttributeError, NotImplementedError, AssertionError, ValueError):
        clip.set_grad_checkpointing(True)  # it fails in as many ways as silently: what has become able is looked at
    modules = [(path.startswith("visual"), module) for path, module in clip.named_modules()]
    able = {visual for visual, module in modules if getattr(module, "grad_checkpointing", False)}
    # open_clip's loop over blocks passes arguments that these do not take.
    able -= {visual for visual, module in modules if type(module).__name__ == _CUSTOM_BLOCK}
    for tower, trained, visual in (("image", image, True), ("text", text, False)):
        if trained and visual not in able:
            raise ModelError(
                f"the {tower} tower of {name} has no gradient checkpointing: set tune.checkpointing=false and "
                "lower the batch size instead"
            )
