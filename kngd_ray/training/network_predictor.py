"""Predictions of a network whose towers are trained: from pictures, at the mean or over draws of all its weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kngd_ray.clip import CLIPNetwork
from kngd_ray.errors import UsageError
from kngd_ray.filters import Belief, Family
from kngd_ray.observations import trainable, unflatten
from kngd_ray.training.batches import seeded
from kngd_ray.training.pixels import Pixels
from kngd_ray.training.predict import DRAWS_SEED, PosteriorOptions, Prediction

_AT_ONCE = 64  # pictures


class NetworkPredictor:
    """A trained network and its belief, ready to predict.

    A draw of the posterior is a network of its own, through which all pictures go: `draws` of them cost that many
    times the mean.

    Args:
        network: at the weights that predict: the posterior mean, or what lies between it and the pretrained model.
        family: covariance family of the belief; None for a method without a posterior.
        belief: the belief, its covariance by parameter; None for a method without a posterior.
        options: how the posterior enters.
    """

    def __init__(
        self,
        network: CLIPNetwork,
        family: Family | None,
        belief: Belief | None,
        options: PosteriorOptions,
    ) -> None:
        if belief is not None:
            check_affordable(options)
        self.head = network
        self.family = family
        self.belief = belief
        self.options = options

    @property
    def device(self) -> torch.device:
        """Where the network is; pictures are brought to it."""
        return self.head.class_embeddings.device

    def predict(self, inputs: Pixels | Tensor, tau: float) -> Prediction:
        """Posterior predictive probabilities.

        Args:
            inputs: m pictures, or their pixels (m, 3, H, W); where the image tower is frozen, their features (m, d).
            tau: posterior temperature; 0 is the point prediction.

        Returns:
            Probabilities and the spread of the logits behind them, on the CPU.
        """
        if self.belief is None or tau == 0 or self.options.predict == "mean":
            logits = self._logits(inputs)
            return Prediction(logits.softmax(1), torch.zeros_like(logits))
        assert self.family is not None
        parameters = trainable(self.head)
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        total: Any = 0.0
        first: Any = 0.0
        second: Any = 0.0
        try:
            for number in range(self.options.draws):
                deviation = self.family.sample(self.belief.covariance, 1, seeded(DRAWS_SEED, number))[0]
                with torch.no_grad():
                    for name, d in unflatten(deviation.to(self.belief.mu), parameters).items():
                        parameters[name].copy_(kept[name] + tau**0.5 * d)
                logits = self._logits(inputs)
                total, first, second = total + logits.softmax(1), first + logits, second + logits.square()
        finally:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(kept[name])
        draws = self.options.draws
        return Prediction(total / draws, (second / draws - (first / draws).square()).clamp_min(0).sqrt())

    def _logits(self, inputs: Pixels | Tensor) -> Tensor:
        device = self.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            t = self.head.classifier()  # once for all pictures
            # of no pictures, as a fold may hold out, towers take no batch
            found = [
                self.head.classify(self.head.received(pixels), t).cpu()
                for pixels in self._pixels(inputs)
                if len(pixels)
            ]
        return torch.cat(found) if found else torch.empty(0, len(t), dtype=t.dtype)

    def _pixels(self, inputs: Pixels | Tensor) -> Iterator[Tensor]:
        return iter(inputs.split(_AT_ONCE)) if isinstance(inputs, Tensor) else inputs.pixels(self.head.pictures.decoded)


def check_affordable(options: PosteriorOptions) -> None:
    """Refuse what takes too long where towers are trained.

    Args:
        options: how the posterior of a network enters.

    Raises:
        UsageError: the variance of the logits is asked for.
    """
    if options.predict == "linearised":
        raise UsageError(
            "posterior.predict=linearised takes a backward pass per class and picture, and is for adapters: "
            "set it to mean or draws where towers are trained."
        )
