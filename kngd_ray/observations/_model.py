"""What an observation model is: rows that are linear in the logits' Jacobian.

With logits ``l = head(x)`` of one sample and J = d l / d theta (C, n), every model here observes k
scalars of the sample whose Jacobian rows are ``V J`` for a (k, C) matrix V of *cotangents*. So a
model is a function of logits alone, one vector-Jacobian product per row does the rest, and what h
is stays apart from how H is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from kngd_ray._deferred import Tensor, torch

_MARGIN = 1e-6  # of a probability from 0 and 1, where odds are counted


@dataclass(frozen=True)
class Observation:
    """The k observations of each of m samples.

    Attributes:
        innovation: (m, k) nu = y - h(mu).
        cotangent: (m, k, C) V, the derivative of h with respect to the logits.
        base_noise: (m, k) noise variance known from the likelihood.
        channel: (m, k) int64 class that each observation is about, for noise kept per class.
        compute_gate_residuals: computes :attr:`gate_residuals` when a gate asks; None where the innovations are
            residuals themselves.
    """

    innovation: Tensor
    cotangent: Tensor
    base_noise: Tensor
    channel: Tensor
    compute_gate_residuals: Callable[[], Tensor] | None = None

    @property
    def gate_residuals(self) -> Tensor:
        """What a gate tests in place of the innovations: (m, k, 2) residuals of unit noise and their scales.

        The scale takes an observation's row of H to that of its residual. It is 0 where there is no residual.
        Both are 0 where the innovations are residuals, which a gate tests as they are.
        """
        if self.compute_gate_residuals is None:
            return self.innovation.new_zeros(*self.innovation.shape, 2)
        return self.compute_gate_residuals()


class ObservationModel(Protocol):
    """An observation model; its options are the fields of the frozen dataclass that implements it."""

    @property
    def kind(self) -> str:
        """The model's name in configuration files."""
        ...

    @property
    def r0(self) -> float:
        """Initial noise variance of each observation, on top of what the likelihood gives."""
        ...

    @property
    def residual(self) -> bool:
        """Whether the innovation is a residual, whose spread tells of the noise, or a device of the algebra."""
        ...

    @property
    def likelihood(self) -> float | None:
        """Variance that the likelihood gives a row on top of its base noise; None where there is no likelihood."""
        ...

    @property
    def pairs(self) -> bool:
        """Whether it sees the image-text pairs of the whole batch, through :meth:`observe_pairs`."""
        ...

    def rows(self, classes: int) -> int:
        """Observations per sample."""
        ...

    def draws(self, classes: int) -> int:
        """How many uniform random numbers the model needs per sample."""
        ...

    def observe(self, logits: Tensor, labels: Tensor, logit_scale: float, uniforms: Tensor) -> Observation:
        """Observations at the current mean.

        Args:
            logits: (m, C) class logits.
            labels: (m,) int64 true classes.
            logit_scale: s, the factor from cosines to logits.
            uniforms: (m, draws) random numbers in [0, 1).

        Returns:
            The observations of the m samples.
        """
        ...

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """What a sample costs at noise 1, of a model with a likelihood.

        Args:
            logits: (m, C) class logits.
            labels: (m,) int64 true classes.

        Returns:
            (m,) negative log-likelihoods, nats; None of residuals, which cost half their square.
        """
        ...

    def observe_pairs(
        self, outputs: Tensor, labels: Tensor, logit_scale: float, own: slice, classes: int
    ) -> Observation:
        """Observations of a model that sees pairs, at the current mean.

        Args:
            outputs: (M, C + 4 d) of the whole batch: logits, and the unit embeddings of images and texts, those of the
                original towers last.
            labels: (M,) int64 true classes.
            logit_scale: s, the factor from cosines to logits.
            own: which samples are observed here.
            classes: C.

        Returns:
            The observations of the own samples, cotangents (m, k, C + 4 d).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Noisy:
    """What the models share: a noise variance r0, one residual per sample, no need of random numbers.

    Attributes:
        residual: whether the innovation is a residual.
        likelihood: variance that the likelihood gives a row on top of its base noise.
        pairs: whether it sees the image-text pairs of the whole batch.
        r0: initial noise variance of each observation.
    """

    residual: ClassVar[bool] = True
    likelihood: ClassVar[float | None] = None
    pairs: ClassVar[bool] = False

    r0: float = 1.0

    def __post_init__(self) -> None:
        if not self.r0 > 0:
            raise ValueError(f"r0 is {self.r0}; an observation noise variance must be above 0")

    def rows(self, classes: int) -> int:
        """One."""
        return 1

    def draws(self, classes: int) -> int:
        """None."""
        return 0

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """None: residuals cost half their square."""
        return None

    def observe_pairs(
        self, outputs: Tensor, labels: Tensor, logit_scale: float, own: slice, classes: int
    ) -> Observation:
        """Of models that see pairs only.

        Raises:
            TypeError: this one does not.
        """
        raise TypeError(f"{type(self).__name__} does not observe pairs")


def label_odds(p: Tensor) -> Tensor:
    """Odds p / (1 - p) of the label, finite and above 0.

    As a Bernoulli variable the label has the residual 1 - p with noise p (1 - p), which is odds^-1/2 in units of it.

    Args:
        p: probability of the label.

    Returns:
        The odds, within 1e-6 and 1e6.
    """
    p = p.clamp(_MARGIN, 1.0 - _MARGIN)
    return p / (1.0 - p)


def stack(observations: Sequence[Observation], channels: int) -> Observation:
    """Put the rows of several models side by side, each with channels of its own; gate residuals are left out.

    Args:
        observations: what each model saw of the same m samples.
        channels: noise variances kept per model: 1, or one per class.

    Returns:
        One observation with the sum of the models' k, its channels numbered through all models.
    """
    if len(observations) == 1:
        (only,) = observations
        return Observation(only.innovation, only.cotangent, only.base_noise, only.channel % channels)
    return Observation(
        torch.cat([o.innovation for o in observations], 1),
        torch.cat([o.cotangent for o in observations], 1),
        torch.cat([o.base_noise for o in observations], 1),
        torch.cat([o.channel % channels + b * channels for b, o in enumerate(observations)], 1),
    )
