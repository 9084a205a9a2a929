r"""Predictions of a network whose towers are trained: from pictures, at the mean, over draws, or linearised.

Linearised, the logits f of a picture are normal around those of the mean. Where the adapters were fitted before the
towers, their part of the covariance is a product, known without a pass. The towers' part takes one backward pass for a
batch, in the direction that decides: the most probable class t against the others, weighted by their probabilities ::

    r = e_t - sum_{c != t} p_c / (1 - p_t) e_c      v = r^T J P J^T r      covariance of the towers' part  v / |r|^2 I

J P J^T along other directions is not looked at. Where the text tower is trained on class logits, the towers' part would
take a pass through all prompts for each picture, and is left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kngd_ray.clip import CLIPNetwork, tower_products
from kngd_ray.errors import UsageError
from kngd_ray.filters import Belief, Family, variances
from kngd_ray.observations import Linearizer, trainable, unflatten
from kngd_ray.training.batches import seeded
from kngd_ray.training.pixels import Pixels
from kngd_ray.training.predict import DRAWS_SEED, PosteriorOptions, Prediction, centred_variances, moderated
from kngd_ray.training.streamed import ADAPTERS

_AT_ONCE = 64  # pictures
_LINEARISED = 32  # likewise, whose activations are kept


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
            check_affordable(options, network)
        self.head = network
        self.family = family
        self.belief = belief
        self.options = options
        self._linearizer: Linearizer | None = None

    @property
    def left_out(self) -> bool:
        """Whether predictions have the head's part of the posterior alone."""
        return self.belief is not None and self.options.predict == "linearised" and self.head.live_text

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
        if self.options.predict == "linearised":
            logits, variance = self._linearised(inputs)
            variance = tau * variance
            return Prediction(moderated(logits, variance).softmax(1), variance.sqrt())
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

    def logit_variance(self, inputs: Pixels | Tensor) -> Tensor:
        """Linearised posterior variance of the class logits around their mean over classes.

        Args:
            inputs: as of :meth:`predict`.

        Returns:
            (m, C) variances at tau = 1, on the CPU; zeros without a posterior.
        """
        if self.belief is None:
            return torch.zeros_like(self._logits(inputs))
        return self._linearised(inputs)[1]

    def _linearised(self, inputs: Pixels | Tensor) -> tuple[Tensor, Tensor]:
        """(m, C) logits and their variances at tau = 1, on the CPU."""
        C = self.head.classes
        found = [(torch.empty(0, C), torch.empty(0, C))]
        for pixels in self._pixels(inputs):
            for some in pixels.split(_LINEARISED):
                logits, variance = self._of_batch(self.head.received(some))
                found.append((logits.cpu(), variance.to(logits).cpu()))
        return torch.cat([logits for logits, _ in found]), torch.cat([variance for _, variance in found])

    def _of_batch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a few pictures, or for features where the image tower is frozen."""
        network, C = self.head, self.head.classes
        assert self.belief is not None
        assert self.family is not None
        if self._linearizer is None:
            self._linearizer = Linearizer(network, network.example(2))
        labels = torch.zeros(len(images), dtype=torch.long, device=self.device)
        part = {"feature": images} if images.dim() == 2 else {"image": images}
        passed = self._linearizer.run(network.inputs(labels, **part))
        logits = passed.logits[:, :C].detach()
        P, factors = self.belief.covariance, self._head_factors()
        names = [layer.name for layer in self._linearizer.layers]
        variance = torch.zeros_like(logits)
        if factors is not None:
            names = [name for name in names if not name.startswith(ADAPTERS)]
            with torch.no_grad():
                residual = network.head.residual
                assert residual is not None
                x = residual.inputs(images if images.dim() == 2 else network.encode(images)).to(factors["A"])
            along = network.logit_scale**2 * ((x @ factors["A"]) * x).sum(1).clamp_min(0)
            variance = torch.outer(along, centred_variances(factors["B"])).to(logits)
            if network.live_text:
                return logits, variance
        r = decisive(logits)
        with tower_products(self.device):
            H = passed.jacobian(pad(r, (0, passed.logits.shape[1] - C)).unsqueeze(1))
        like = logits[:, :1]
        total = torch.zeros_like(like)
        for name in names:  # one layer's rows at a time
            total = total + variances(self.family, {name: P[name]}, {name: H[name]}, like)
        spread = total.clamp_min(0) / r.square().sum(1, keepdim=True) * (1 - 1 / C)
        return logits, variance + spread

    def _head_factors(self) -> Mapping[str, Tensor] | None:
        """B and A of a class residual that keeps them; None for other adapters and beliefs."""
        assert self.belief is not None
        residual = self.head.head.residual if self.head.started else None
        P = None if residual is None else self.belief.covariance.get(f"{ADAPTERS}adapters.0.delta.weight")
        return P if P is not None and "B" in P else None

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


def decisive(logits: Tensor) -> Tensor:
    """The direction of logits that decides: the most probable class against the others, by their probabilities.

    Args:
        logits: (m, C).

    Returns:
        (m, C) with rows that sum to 0.
    """
    top = logits.argmax(1, keepdim=True)
    others = logits.scatter(1, top, -torch.inf).softmax(1)
    return torch.zeros_like(logits).scatter(1, top, 1.0) - others


def check_affordable(options: PosteriorOptions, network: CLIPNetwork) -> None:
    """Refuse what would take too long where towers are trained.

    Args:
        options: how the posterior of a network enters.
        network: whose towers are trained.

    Raises:
        UsageError: the variance of the logits is asked for, every picture's goes through all prompts, and there is no
            head of which a part of it is known.
    """
    if options.predict == "linearised" and network.live_text and network.options.start == "zero_shot":
        raise UsageError(
            "posterior.predict=linearised takes a backward pass through all class prompts for each picture where the "
            "text tower is trained on the class logits: set it to mean or draws, or tune.start=head."
        )
