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
_SETTLED = 1e-6  # relative change of the variances that further sweeps would bring


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
        """The problem for Newton's method, from whitened inputs Z (N, r) and in their precision."""
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
    step = rows @ white.weights(residual.mT) / batch.noise
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

    Each fit starts from the one before.

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
            self._across.append(white.others(batch.scale * x))
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

    The two equations are solved in turn. With ``b = tr(B^-1 B')`` and D the weights ``tr(H_n B') / r`` of the samples,
    the second is ``A' = o (b A^-1 + x^T D x)^-1``: found in the space of the samples where these are no more than the
    inputs, else along the axes of the batch.

    Args:
        B: (o, o) float64 prior covariance of rows.
        A: (i, i) float64 prior covariance of columns.
        white: the batch's scaled inputs, whitened by A.
        p: (N, o) float64 probabilities at the mode.
        noise: r.

    Returns:
        B' (o, o), A' (i, i) with the trace of A, and half the log-determinant of the posterior over the prior, nats.
    """
    o, i = len(B), len(A)
    B_inverse = _inverse(B)
    columns = (_Axes if white.K is None else _Samples)(white, o, i)
    seen_from, traced, last = columns.prior, float(i), 0.0  # x_n^T A' x_n, tr(A^-1 A') and its last change
    for _ in range(_SWEEPS):
        weighed = p * (seen_from / noise).unsqueeze(1)
        B_new = _inverse((traced * B_inverse + torch.diag(weighed.sum(0)) - weighed.mT @ p) / i)
        seen = (p @ B_new.diagonal() - ((p @ B_new) * p).sum(1)) / noise  # tr(H_n B') / r
        now = columns.condition(seen.clamp_min(0), (B_inverse * B_new).sum())
        change, traced = abs(now / traced - 1), now
        # each sweep shrinks what is left about as much as the one before did
        if change * (min(change / last, 1.0) if last else 1.0) <= _SETTLED:
            break
        seen_from, last = columns.variances(), change
    A_new = columns.covariance(A)
    log_det = o * columns.log_det() + i * (_log_det(B_new) - _log_det(B))
    scale = A.diagonal().sum() / A_new.diagonal().sum()
    # laid out as a checkpoint is read back: products then round alike
    return (B_new / scale).contiguous(), symmetric(A_new * scale).contiguous(), 0.5 * log_det


class _Samples:
    """A' in the space of the samples: ``(o / b) (A - A x^T D^1/2 S^-1 D^1/2 x A)``, S = b I + D^1/2 K D^1/2.

    Args:
        white: the batch, of at most as many samples as inputs.
        o: number of rows.
        i: number of columns.
    """

    def __init__(self, white: Whitened, o: int, i: int) -> None:
        assert white.K is not None
        self._K, self._xA, self._o, self._i = white.K, white.back, o, i
        self.prior = white.K.diagonal()

    def condition(self, seen: Tensor, b: Tensor) -> float:
        """Take weights D (N,) and b; returns the new tr(A^-1 A')."""
        self._by, self._b = seen.sqrt().unsqueeze(1), b
        S = self._by * self._K * self._by.mT
        S.diagonal().add_(b)
        self._root = torch.linalg.cholesky(S)
        lost = torch.linalg.solve_triangular(self._root, self._by * self._K, upper=False).square().sum(0)
        self._variances = self._o / b * (self.prior - lost)
        self._across, traced = torch.stack([
            self._o / b,
            (self._o * self._i - (seen * self._variances).sum()) / b,
        ]).tolist()
        return traced

    def variances(self) -> Tensor:
        """(N,) x_n^T A' x_n."""
        return self._variances

    def covariance(self, A: Tensor) -> Tensor:
        """A' (i, i)."""
        gain = torch.linalg.solve_triangular(self._root, self._by * self._xA, upper=False)
        return self._across * torch.addmm(A, gain.mT, gain, alpha=-1)

    def log_det(self) -> float:
        """Log det(A^-1 A'), nats."""
        lost = len(self._root) * self._b.log() - 2 * self._root.diagonal().log().sum()
        return self._i * log(self._across) + float(lost)


class _Axes:
    """A' along the axes of the batch, in which A is the identity: ``o T^-1`` with T = b I + Z^T D Z, across them o / b.

    Args:
        white: the batch, of more samples than inputs.
        o: number of rows.
        i: number of columns.
    """

    def __init__(self, white: Whitened, o: int, i: int) -> None:
        self._Z, self._Y, self._o, self._i = white.Z, white.back, o, i
        self._identity = torch.eye(self._Z.shape[1], dtype=self._Z.dtype, device=self._Z.device)
        self.prior = self._Z.square().sum(1)

    def condition(self, seen: Tensor, b: Tensor) -> float:
        """Take weights D (N,) and b; returns the new tr(A^-1 A')."""
        self._inner = _inverse((b * self._identity + (self._Z * seen.unsqueeze(1)).mT @ self._Z) / self._o)
        across = self._o / b
        self._across, traced = torch.stack([
            across,
            (self._i - len(self._inner)) * across + self._inner.trace(),
        ]).tolist()
        return traced

    def variances(self) -> Tensor:
        """(N,) x_n^T A' x_n."""
        return ((self._Z @ self._inner) * self._Z).sum(1)

    def covariance(self, A: Tensor) -> Tensor:
        """A' (i, i)."""
        return self._across * A + self._Y.mT @ (self._inner - self._across * self._identity) @ self._Y

    def log_det(self) -> float:
        """Log det(A^-1 A'), nats."""
        return _log_det(self._inner) + (self._i - len(self._inner)) * log(self._across)


def _inverse(P: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(symmetric(P)))


def _log_det(P: Tensor) -> float:
    return 2 * float(torch.linalg.cholesky(P).diagonal().log().sum())
