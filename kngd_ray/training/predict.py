"""Predictions that carry the posterior: point, Monte Carlo, and linearised variance of the logits."""

from dataclasses import dataclass
from itertools import chain
from math import pi

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from kngd_ray.clip import CLIPHead
from kngd_ray.filters import Belief, Family, Kronecker, variances
from kngd_ray.observations import Linearizer, trainable, unflatten
from kngd_ray.training.batches import seeded
from kngd_ray.training.posterior_options import PosteriorOptions as PosteriorOptions

DRAWS_SEED = 2024  # fixed: the same checkpoint predicts the same numbers every time
_ENTRIES = 1 << 25  # drawn logits held at once, 128 MB in float32
_EMBEDDED = 1 << 20  # numbers of adapted embeddings computed at once: more does not fit the caches
_LINEARISED = 64  # samples at once
# of which a posterior temperature is chosen
TAU_GRID = (0.0, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 1.0)


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of m samples.

    Attributes:
        probabilities: (m, C) posterior predictive probabilities.
        logit_std: (m, C) posterior standard deviation of the logits less their mean over classes; zeros without a
            posterior.
    """

    probabilities: Tensor
    logit_std: Tensor


class Predictor:
    """A trained head and its belief, ready to predict.

    Args:
        head: maps (m, d) features to (m, C) logits, at the posterior mean.
        family: covariance family of the belief; None for a method without a posterior.
        belief: the whole belief; None for a method without a posterior.
        options: how the posterior enters.
    """

    def __init__(
        self, head: nn.Module, family: Family | None, belief: Belief | None, options: PosteriorOptions
    ) -> None:
        self.head = head
        self.family = family
        self.belief = belief
        self.options = options
        self._deviations: Tensor | None = None
        self._linearizer: Linearizer | None = None
        self._known: tuple[Tensor, Tensor] | None = None  # features and their variance: taus are tried on the same ones

    @property
    def device(self) -> torch.device:
        """Where features have to be."""
        return next(chain(self.head.buffers(), self.head.parameters())).device

    @property
    def linearises(self) -> bool:
        """Whether the variance of logits has a part in predictions, and is known for what it costs."""
        return self.belief is not None and self.options.predict != "mean"

    def predict(self, features: Tensor, tau: float) -> Prediction:
        """Posterior predictive probabilities.

        Args:
            features: (m, d) unit image embeddings.
            tau: posterior temperature; 0 is the point prediction.

        Returns:
            Probabilities and the spread of the logits behind them.
        """
        logits = self.mean_logits(features)
        if self.belief is None or tau == 0 or self.options.predict == "mean":
            return Prediction(logits.softmax(1), torch.zeros_like(logits))
        if self.options.predict == "linearised":
            variance = tau * self.logit_variance(features)
            return Prediction(moderated(logits, variance).softmax(1), variance.sqrt())
        chunk = max(1, _ENTRIES // (self.options.draws * logits.shape[1]))
        parts = [self._over_draws(x, tau) for x in features.split(chunk)]
        return Prediction(torch.cat([p for p, _ in parts]), torch.cat([spread for _, spread in parts]))

    def mean_logits(self, features: Tensor) -> Tensor:
        """Logits at the mean of the belief.

        Args:
            features: (m, d) unit image embeddings.

        Returns:
            (m, C).
        """
        with torch.no_grad():
            logits: Tensor = self.head(features)
        return logits

    def logit_variance(self, features: Tensor) -> Tensor:
        """Linearised posterior variance of the class logits around their mean over classes, which no softmax sees.

        Args:
            features: (m, d) unit image embeddings.

        Returns:
            (m, C) variances at tau = 1; zeros without a posterior.
        """
        if self._known is not None and self._known[0] is features:
            return self._known[1]
        logits = self.mean_logits(features)
        C = logits.shape[1]
        if (product := self.product(features)) is not None:
            found = torch.outer(product[0], centred_variances(product[1])).to(logits)
        else:
            centred = centring(C, logits)
            found = self.variance_along(features, centred.expand(len(logits), C, C))
        self._known = features, found
        return found

    def product(self, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """The joint posterior covariance of the logits, where it is a product.

        The logits of a class residual under a Kronecker posterior B (x) A are jointly Gaussian with covariance
        s^2 (x^T A x) B for each sample.

        Args:
            features: (m, d) unit image embeddings.

        Returns:
            (m,) s^2 x^T A x and (C, C) B, at tau = 1; None for other heads and families.
        """
        residual = self.head.residual if isinstance(self.head, CLIPHead) else None
        if residual is None or self.belief is None or not isinstance(self.family, Kronecker):
            return None
        (P,) = self.belief.covariance.values()
        x = residual.inputs(features).to(P["A"])
        assert isinstance(self.head, CLIPHead)
        return self.head.logit_scale**2 * ((x @ P["A"]) * x).sum(1).clamp_min(0), P["B"]

    def variance_along(self, features: Tensor, cotangent: Tensor) -> Tensor:
        """Posterior variance of linear functions of the logits, correlations between classes included.

        Args:
            features: (m, d) unit image embeddings.
            cotangent: (m, k, C) the functions.

        Returns:
            (m, k) variances at tau = 1; zeros without a posterior.
        """
        like = cotangent[:, :, 0]
        if self.belief is None or self.family is None or not len(features):
            return torch.zeros_like(like)
        if (product := self.product(features)) is not None:
            spread, B = product
            V = cotangent.to(B)
            return (spread.unsqueeze(1) * ((V @ B) * V).sum(2)).clamp_min(0).to(like)
        if self._linearizer is None:
            self._linearizer = Linearizer(self.head, features[:1])
        found = []
        for x, V in zip(features.split(_LINEARISED), cotangent.split(_LINEARISED), strict=True):
            H = self._linearizer.run(x).jacobian(V)
            found.append(variances(self.family, self.belief.covariance, H, V[:, :, 0]))
        return torch.cat(found).clamp_min(0)

    def _over_draws(self, features: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """Mean probabilities and standard deviation of the logits over the draws."""
        assert self.belief is not None
        mu, parameters = self.belief.mu, trainable(self.head)

        def logits_at(deviation: Tensor) -> Tensor:
            logits: Tensor = functional_call(self.head, unflatten(mu + tau**0.5 * deviation, parameters), (features,))
            return logits

        with torch.no_grad():
            drawn = vmap(logits_at, chunk_size=max(1, _EMBEDDED // max(1, features.numel())))(self._draw())
        spread = (drawn - drawn.mean(2, keepdim=True)).std(0, correction=0)
        return drawn.softmax(2).mean(0), spread

    def _draw(self) -> Tensor:
        """(draws, n) deviations from N(0, P), the same for every call so that samples are comparable."""
        if self._deviations is None:
            assert self.belief is not None
            assert self.family is not None
            deviations = self.family.sample(self.belief.covariance, self.options.draws, seeded(DRAWS_SEED))
            self._deviations = deviations.to(self.belief.mu)
        return self._deviations


def moderated(logits: Tensor, variance: Tensor) -> Tensor:
    """Logits whose softmax is about the mean softmax of uncertain logits, which are jointly Gaussian.

    For two classes it is MacKay's probit moderation (arXiv 2002.10118, eq. 8) of the difference of their logits, for
    more classes the same with the mean variance of all differences. A constant added to all logits, which a softmax
    does not see, has no part in it, nor has its variance. The most probable class stays the same.

    Args:
        logits: (m, C) means.
        variance: (m, C) variances of the logits less their mean over classes.

    Returns:
        (m, C) logits.
    """
    # sum_c Var(l_c - mean l) is (C - 1) / 2 times the mean of Var(l_a - l_b) over pairs of classes
    of_pairs = variance.sum(1, keepdim=True) * (2 / max(logits.shape[1] - 1, 1))
    return logits / (1 + pi / 8 * of_pairs).sqrt()


def centred_variances(B: Tensor) -> Tensor:
    """Variances of logits less their mean over classes.

    Args:
        B: (C, C) their joint covariance.

    Returns:
        (C,) the diagonal of (I - 1 / C) B (I - 1 / C).
    """
    means = B.mean(0)
    return (B.diagonal() - 2 * means + means.mean()).clamp_min(0)


def centring(classes: int, like: Tensor) -> Tensor:
    """The matrix that subtracts from logits their mean over classes.

    Args:
        classes: C.
        like: of its dtype and device.

    Returns:
        (C, C) I - 1 / C.
    """
    return torch.eye(classes, dtype=like.dtype, device=like.device) - 1.0 / classes


def entropy(probabilities: Tensor) -> Tensor:
    """Predictive entropy, the uncertainty that pictures are ranked by.

    Args:
        probabilities: (m, C).

    Returns:
        (m,) nats, 0 to log C.
    """
    return torch.special.entr(probabilities).sum(1)
