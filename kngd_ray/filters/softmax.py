r"""Conditioning a linear softmax classifier at its mode: the iterated Kalman update carried to its end.

A head that is linear in its weights W (o, i) gives sample n the logits ::

    f_n = f_n^- + s (W - W^-) x_n        W - W^- ~ N(0, B (x) A)        y_n ~ softmax(f_n), counted 1 / r times

**The mean** is the mode of this posterior (:mod:`kngd_ray.filters.newton`).

**The covariance** at the mode has the precision ``B^-1 (x) A^-1 + sum_n s^2 / r H_n (x) x_n x_n^T``, with
H_n = diag(p_n) - p_n p_n^T. The product B' (x) A' nearest to it (least KL divergence from the product) solves ::

    i B'^-1 = tr(A^-1 A') B^-1 + s^2 / r sum_n (x_n^T A' x_n) H_n
    o A'^-1 = tr(B^-1 B') A^-1 + s^2 / r sum_n tr(H_n B') x_n x_n^T

by sweeps, each of which can only lessen the divergence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, log

from kngd_ray._deferred import Tensor, functional, torch
from kngd_ray.errors import FilterError
from kngd_ray.filters import newton
from kngd_ray.filters.dense import symmetric
from kngd_ray.filters.newton import Problem, RowRoot, Whitened

_LEAST = 1e-12  # probability
_COARSE = 0.3  # nats of a logit: so near the mode, single precision alone would not end where it is
_SWEEPS = 30
_SETTLED = 1e-6  # relative change of the variances in a sweep


@dataclass(frozen=True)
class SoftmaxPosterior:
    """What a batch made of a belief over a linear softmax classifier.

    Attributes:
        step: (o, i) mean less the predicted one.
        B: (o, o) covariance of rows.
        A: (i, i) covariance of columns.
        log_evidence: Laplace's approximation of the labels' log-probability, nats.
        nis: squared Mahalanobis distance of the step and of the residuals at the mode, (1 - p_y) / p_y of each sample.
        linearisations: how often the batch was linearised.
        settled: whether the last step moved no logit by more than the tolerance.
    """

    step: Tensor
    B: Tensor
    A: Tensor
    log_evidence: float
    nis: float
    linearisations: int
    settled: bool


@dataclass(frozen=True)
class Classified:
    """A batch as a linear softmax classifier sees it.

    Attributes:
        x: (N, i) inputs of the layer.
        logits: (N, o) at the predicted mean.
        labels: (N,) int64 classes.
        scale: s, from the layer's output to a logit.
        noise: r; above 1 each sample counts less than once.
    """

    x: Tensor
    logits: Tensor
    labels: Tensor
    scale: float
    noise: float = 1.0

    def problem(self, Z: Tensor) -> Problem:
        """What Newton's method is asked, of whitened inputs Z (N, r) and in their precision."""
        counts = torch.full_like(self.labels, 1.0 / self.noise, dtype=Z.dtype)
        return Problem(Z.unsqueeze(0), self.logits.to(Z).unsqueeze(0), self.labels.unsqueeze(0), counts.unsqueeze(0))


def condition(B: Tensor, A: Tensor, batch: Classified, *, tolerance: float, linearisations: int) -> SoftmaxPosterior:
    """Condition a Kronecker belief on a batch, at the mode.

    Args:
        B: (o, o) covariance of rows.
        A: (i, i) covariance of columns.
        batch: what is observed.
        tolerance: of a logit in nats, to which the mode is found.
        linearisations: at most.

    Returns:
        The posterior.

    Raises:
        FilterError: an input is not finite.
    """
    if not len(batch.labels):
        step = torch.zeros(len(B), len(A), dtype=B.dtype, device=B.device)
        return SoftmaxPosterior(step, B, A, 0.0, 0.0, 1, True)
    if not isfinite(float(batch.x.sum()) + float(batch.logits.sum())):
        raise FilterError(
            "features or logits are NaN or infinite: the step was refused and the belief kept; look for non-finite "
            "features, or lower the prior variance (filter.logit_variance or filter.p0)."
        )
    white = Whitened.of(batch.scale * batch.x.double(), A.double())
    rows = B.double()
    found = _mode(batch.problem(white.Z), RowRoot.of(rows), tolerance=tolerance, linearisations=linearisations)
    p = found.log_p[0].exp()
    # At the mode W - W^- = P H^T w with w = y - p: all that is left of the iterations is the residual.
    residual = functional.one_hot(batch.labels, len(B)).to(p) - p
    step = rows @ (residual.mT @ white.Z) @ white.Y / batch.noise
    B_new, A_new, shrunk = nearest_product(rows, A.double(), white, p, batch.noise)
    p_label = p.gather(1, batch.labels.unsqueeze(1)).clamp_min(_LEAST)
    objective, distance, surprise = torch.stack([
        found.objective[0],
        found.distance[0],
        (1 / p_label - 1).sum(),
    ]).tolist()
    return SoftmaxPosterior(
        step.to(B.dtype),
        B_new.to(B.dtype),
        A_new.to(A.dtype),
        shrunk - objective,
        2 * distance + surprise / batch.noise,
        found.linearisations,
        found.settled,
    )


class HeldOut:
    """Folds of a batch, fitted together under one prior variance after another.

    Each fit is begun at the one before.

    Args:
        folds: of each, (i, i) covariance of columns, what is observed, and (k, i) inputs that are held out.
        tolerance: of a logit, nats.
        linearisations: at most.
    """

    def __init__(
        self, folds: Sequence[tuple[Tensor, "Classified", Tensor]], *, tolerance: float, linearisations: int
    ) -> None:
        problems, self._across = [], []
        for A, batch, x in folds:
            white = Whitened.of(batch.scale * batch.x, A.to(batch.x))
            problems.append(batch.problem(white.Z))
            self._across.append(batch.scale * x @ white.Y.mT)
        self._problem = Problem.stacked(problems)
        self._tolerance, self._linearisations = tolerance, linearisations
        self._U: Tensor | None = None
        self._variance = 1.0

    def logits(self, variance: float) -> list[Tensor]:
        """What is learned under B = v I, as the logits of the inputs that are held out.

        Args:
            variance: v.

        Returns:
            Of each fold, (k, o) by which they move from the predicted mean.
        """
        Z = self._problem.Z
        rows = RowRoot(torch.full((), variance**0.5, dtype=Z.dtype, device=Z.device))
        start = None if self._U is None else self._U * (self._variance / variance) ** 0.5
        found = newton.mode(
            self._problem, rows, tolerance=self._tolerance, linearisations=self._linearisations, start=start
        )
        self._U, self._variance = found.U, variance
        return [
            rows.logits(across @ U[:, : across.shape[1]].mT) for across, U in zip(self._across, found.U, strict=True)
        ]


def _mode(problem: Problem, rows: RowRoot, *, tolerance: float, linearisations: int) -> newton.Mode:
    """Find a mode in the problem's own precision, and the way there in single precision, at half the cost."""
    if linearisations == 1:
        return newton.mode(problem, rows, tolerance=tolerance, linearisations=1)
    near = newton.mode(
        problem.to(torch.float32),
        rows.to(torch.float32),
        tolerance=max(_COARSE, tolerance),
        linearisations=linearisations - 1,
    )
    left = linearisations - near.linearisations
    found = newton.mode(problem, rows, tolerance=tolerance, linearisations=left, start=near.U.to(problem.Z))
    return replace(found, linearisations=near.linearisations + found.linearisations)


def nearest_product(B: Tensor, A: Tensor, white: Whitened, p: Tensor, noise: float) -> tuple[Tensor, Tensor, float]:
    """The Kronecker product nearest to a softmax posterior.

    In the coordinates in which A is the identity, A' is T^-1 along the axes of the batch, and (o / b) I across them,
    with ``o T = b I + Z^T diag(tr(H_n B')) Z / r`` and ``b = tr(B^-1 B')``.

    Args:
        B: (o, o) float64 prior covariance of rows.
        A: (i, i) float64 prior covariance of columns.
        white: the batch's scaled inputs, whitened by A.
        p: (N, o) float64 probabilities at the mode.
        noise: r.

    Returns:
        B' (o, o), A' (i, i) with the trace of A, and half the log-determinant of the posterior over the prior, nats.
    """
    Z, Y = white.Z, white.Y
    o, i, r = len(B), len(A), Z.shape[1]
    B_inverse, identity = _inverse(B), torch.eye(r, dtype=Z.dtype, device=Z.device)
    inner, across = identity, 1.0  # T^-1 and o / b
    seen_from, traced = Z, float(i)  # Z A' along the axes of the batch, and tr(A^-1 A')
    for _ in range(_SWEEPS):
        weighed = p * ((seen_from * Z).sum(1) / noise).unsqueeze(1)  # by x_n^T A' x_n / r
        B_new = _inverse((traced * B_inverse + torch.diag(weighed.sum(0)) - weighed.mT @ p) / i)
        seen = (p @ B_new.diagonal() - ((p @ B_new) * p).sum(1)) / noise  # tr(H_n B') / r
        b = (B_inverse * B_new).sum()
        inner = _inverse((b * identity + (Z * seen.unsqueeze(1)).mT @ Z) / o)
        across, now = torch.stack([o / b, (i - r) * o / b + inner.trace()]).tolist()
        before, traced = traced, now
        if abs(traced - before) <= _SETTLED * before:
            break
        seen_from = Z @ inner
    A_new = across * A + Y.mT @ (inner - across * identity) @ Y
    log_det = o * (_log_det(inner) + (i - r) * log(across)) + i * (_log_det(B_new) - _log_det(B))
    scale = A.diagonal().sum() / A_new.diagonal().sum()
    # laid out as a checkpoint is read back: products then round alike
    return (B_new / scale).contiguous(), symmetric(A_new * scale).contiguous(), 0.5 * log_det


def _inverse(P: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(symmetric(P)))


def _log_det(P: Tensor) -> float:
    return 2 * float(torch.linalg.cholesky(P).diagonal().log().sum())
