r"""The prior's mean: how much of the zero-shot logits is believed before any shot is learned from.

The weights start where they were pretrained, so the prior's mean of the logits is gamma times those of the zero-shot
head. Where CLIP does not know the classes, a gamma near 0 serves best, which is a linear probe; where it does, one near
1. The zero-shot head has seen no shot, so the shots say without any fit how far its logits can be believed: gamma_0, at
which they give the shots' labels the highest probability, is near 0 for labels that they know nothing of, and above 1
for logits that are too timid.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from kngd_ray._deferred import Tensor, torch

_MOST = 4.0
_STEPS = 60
_SETTLED = 1e-9
_LEAST = 0.02  # labels that look worse than chance are no reason to believe the opposite


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """A fixed gamma.

    Attributes:
        kind: the name.
        gamma: factor of the zero-shot logits; 1 is CLIP's own, 0 a linear probe.
    """

    kind: Literal["zero_shot"] = "zero_shot"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check(self.gamma)

    def factor(self, logits: Tensor, labels: Tensor) -> float:
        """The given one."""
        return self.gamma

    def of_others(self, logits: Tensor, labels: Tensor) -> float:
        """That of classes which nothing is learned of: CLIP's own."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Gamma from the shots, as ``gamma gamma_0^rise`` where the zero-shot logits are too timid, else ``gamma_0^fall``.

    The two differ because shots of one domain tell less than they seem to. That their zero-shot logits are too timid,
    gamma_0 above 1, holds elsewhere too. That they know nothing of sketches is no reason to forget photographs.

    Attributes:
        kind: the name.
        gamma: what it is where the zero-shot logits are calibrated on the shots, gamma_0 = 1.
        rise: how far it follows a gamma_0 above 1; 0 not at all, 1 in proportion.
        fall: how far it follows one below 1.
    """

    kind: Literal["calibrated"] = "calibrated"
    gamma: float = 0.7
    rise: float = 0.5
    fall: float = 0.05

    def __post_init__(self) -> None:
        _check(self.gamma)
        for name, power in (("rise", self.rise), ("fall", self.fall)):
            if not 0 <= power <= 1:
                raise ValueError(f"{name} is {power}; it must lie between 0 and 1")

    def factor(self, logits: Tensor, labels: Tensor) -> float:
        """From zero-shot logits of the shots.

        Args:
            logits: (N, C) zero-shot logits.
            labels: (N,) int64 classes.

        Returns:
            Gamma; the given one where there is no shot.
        """
        if not len(labels):
            return self.gamma
        scale = max(likeliest_scale(logits, labels), _LEAST)
        return float(self.gamma * scale ** (self.rise if scale > 1 else self.fall))

    def of_others(self, logits: Tensor, labels: Tensor) -> float:
        """That of classes which nothing is learned of, for which neither residual nor other domains make it smaller.

        Args:
            logits: (N, C) zero-shot logits of the shots, over the classes that are learned.
            labels: (N,) int64 classes.

        Returns:
            The square root of gamma_0: half of what the shots say, as they are of other classes.
        """
        return Calibrated(gamma=1.0, rise=0.5, fall=0.5).factor(logits, labels)


def likeliest_scale(logits: Tensor, labels: Tensor) -> float:
    """The factor of logits under which labels are most likely: the inverse of their temperature.

    Args:
        logits: (N, C).
        labels: (N,) int64 classes.

    Returns:
        gamma_0, between 0 and 4; 1 where all logits of each sample are alike.
    """
    centred = logits.to(torch.promote_types(logits.dtype, torch.float32))
    centred = centred - centred.mean(1, keepdim=True)
    if not float(centred.abs().max()) > 0:
        return 1.0
    wide = torch.float64  # of sums
    seen = centred.gather(1, labels.unsqueeze(1)).sum(dtype=wide)
    settled = max(_SETTLED, 100 * torch.finfo(centred.dtype).eps)
    low, high, factor = seen.new_tensor([0.0, _MOST, 1.0]).unbind()
    for _ in range(_STEPS):  # the loss is convex in the factor: Newton's method, within where its slope changes sign
        weighed = (factor.to(centred) * centred).softmax(1) * centred
        mean = weighed.sum(1, dtype=wide)
        slope = mean.sum() - seen
        curvature = (weighed * centred).sum(dtype=wide) - mean.square().sum()
        low, high = torch.where(slope < 0, factor, low), torch.where(slope < 0, high, factor)
        newton = factor - slope / curvature
        inside = (newton > low) & (newton < high)
        before, factor = factor, torch.where(inside, newton, (low + high) / 2)
        if float((factor - before).abs()) <= settled:
            break
    return float(factor)


def _check(gamma: float) -> None:
    if not (isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma is {gamma}; the zero-shot logits are taken 0 times or more")
