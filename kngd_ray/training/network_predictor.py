r"""Predictions of a network whose towers are trained: from pictures, at the mean, over draws, or linearised.

Linearised, the logits f of a picture are normal around those of the mean. Where the adapters were fitted before the
towers, their part of the covariance is a product, known without a pass. The towers' part takes one backward pass for a
batch, in the direction that decides: the most probable class t against the others, weighted by their probabilities ::

    r = e_t - sum_{c != t} p_c / (1 - p_t) e_c      v = r^T J P J^T r      covariance of the towers' part  v / |r|^2 I

J P J^T along other directions is not looked at. Intervals and novelty percentiles come from the same covariance. Where
the text tower is trained on class logits, the towers' part would take a pass through all prompts for each picture, and
is left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kngd_ray.clip import CLIPNetwork, tower_products
from kngd_ray.errors import UsageError
from kngd_ray.filters import Belief, Family, variances
from kngd_ray.observations import Linearizer, trainable, unflatten
from kngd_ray.training.batches import seeded
from kngd_ray.training.pixels import Pixels
from kngd_ray.training.posterior_options import PosteriorOptions
from kngd_ray.training.predict import DRAWS_SEED, Prediction, centred_variances, moderated
from kngd_ray.training.streamed import ADAPTERS

_AT_ONCE = 64  # pictures
_LINEARISED = 32  # likewise, whose activations are kept


class _Linearised(NamedTuple):
    """Logits of pictures, and their covariance at tau = 1: of the head's part ``along B``, of the towers' ``spread I``.

    On the CPU, but for B.
    """

    logits: Tensor  # (m, C)
    along: Tensor  # (m,)
    B: Tensor  # (C, C)
    spread: Tensor  # (m,)

    def variance(self) -> Tensor:
        """(m, C) of the logits less their mean over classes."""
        own = centred_variances(self.B).to(self.along)
        return (torch.outer(self.along, own) + self.spread.unsqueeze(1) * (1 - 1 / len(own))).to(self.logits)

    def variance_along(self, cotangent: Tensor) -> Tensor:
        """(m, k) of linear functions (m, k, C) of the logits."""
        V = cotangent.to(self.along)
        head = self.along.unsqueeze(1) * ((V @ self.B.to(V)) * V).sum(2)
        return (head.clamp_min(0) + self.spread.unsqueeze(1) * V.square().sum(2)).to(cotangent)


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
        self._known: tuple[Any, _Linearised] | None = (
            None  # pictures and what was found: taus are tried on the same ones
        )

    @property
    def linearises(self) -> bool:
        """Whether the variance of logits has a part in predictions, and is known for what it costs."""
        return self.belief is not None and self.options.predict == "linearised"

    @property
    def left_out(self) -> bool:
        """Whether predictions have the head's part of the posterior alone."""
        return self.linearises and self.head.live_text

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
            found = self._linearised(inputs)
            variance = tau * found.variance()
            return Prediction(moderated(found.logits, variance).softmax(1), variance.sqrt())
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
                centred = (logits - logits.mean(1, keepdim=True)).double()  # as of a head: no softmax sees their mean
                total, first, second = total + logits.softmax(1), first + centred, second + centred.square()
        finally:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(kept[name])
        draws = self.options.draws
        spread = (second / draws - (first / draws).square()).clamp_min(0).sqrt()
        return Prediction(total / draws, spread.to(total))

    def logit_variance(self, inputs: Pixels | Tensor) -> Tensor:
        """Linearised posterior variance of the class logits around their mean over classes.

        Args:
            inputs: as of :meth:`predict`.

        Returns:
            (m, C) variances at tau = 1, on the CPU; zeros without a posterior.
        """
        if self.belief is None:
            return torch.zeros_like(self._logits(inputs))
        return self._linearised(inputs).variance()

    def mean_logits(self, inputs: Pixels | Tensor) -> Tensor:
        """Logits at the mean of the belief.

        Args:
            inputs: as of :meth:`predict`.

        Returns:
            (m, C) on the CPU.
        """
        return self._logits(inputs) if self.belief is None else self._linearised(inputs).logits

    def variance_along(self, inputs: Pixels | Tensor, cotangent: Tensor) -> Tensor:
        """Posterior variance of linear functions of the logits.

        Args:
            inputs: as of :meth:`predict`.
            cotangent: (m, k, C) the functions.

        Returns:
            (m, k) variances at tau = 1, on the CPU; zeros without a posterior.
        """
        if self.belief is None:
            return torch.zeros_like(cotangent[:, :, 0])
        return self._linearised(inputs).variance_along(cotangent)

    def _linearised(self, inputs: Pixels | Tensor) -> _Linearised:
        """Of pictures, some at a time."""
        if self._known is not None and self._known[0] is inputs:
            return self._known[1]
        factors = self._head_factors()
        parts = [
            self._of_batch(self.head.received(some), factors)
            for pixels in self._pixels(inputs)
            for some in pixels.split(_LINEARISED)
            if len(some)
        ]
        C = self.head.classes
        B = torch.zeros(C, C) if factors is None else factors["B"].detach()
        logits, along, spread = torch.empty(0, C), torch.empty(0), torch.empty(0)
        if parts:
            logits, along, spread = (torch.cat([part[n].cpu() for part in parts]) for n in range(3))
        found = _Linearised(logits, along, B.cpu(), spread)
        self._known = inputs, found
        return found

    def _of_batch(self, images: Tensor, factors: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(m, C) logits, (m,) of the head's part, (m,) of the towers', of a few pictures or of features.

        Pictures are features where the image tower is frozen.
        """
        network, C = self.head, self.head.classes
        assert self.belief is not None
        assert self.family is not None
        if self._linearizer is None:
            self._linearizer = Linearizer(network, network.example(2))
        labels = torch.zeros(len(images), dtype=torch.long, device=self.device)
        part = {"feature": images} if images.dim() == 2 else {"image": images}
        passed = self._linearizer.run(network.inputs(labels, **part))
        logits = passed.logits[:, :C].detach()
        P = self.belief.covariance
        names = [layer.name for layer in self._linearizer.layers]
        along = torch.zeros_like(logits[:, 0])
        if factors is not None:
            names = [name for name in names if not name.startswith(ADAPTERS)]
            with torch.no_grad():
                residual = network.head.residual
                assert residual is not None
                x = residual.inputs(images if images.dim() == 2 else network.encode(images)).to(factors["A"])
            along = network.logit_scale**2 * ((x @ factors["A"]) * x).sum(1).clamp_min(0)
            if network.live_text:
                return logits, along, torch.zeros_like(along)
        r = decisive(logits)
        with tower_products(self.device):
            H = passed.jacobian(pad(r, (0, passed.logits.shape[1] - C)).unsqueeze(1))
        total = torch.zeros_like(logits[:, :1])
        for name in names:  # one layer's rows at a time
            total = total + variances(self.family, {name: P[name]}, {name: H[name]}, logits[:, :1])
        return logits, along, (total.clamp_min(0) / r.square().sum(1, keepdim=True)).squeeze(1).to(along)

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
