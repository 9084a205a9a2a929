r"""Conditioning a linear softmax classifier at its mode: the iterated Kalman update carried to its end.

A head that is linear in its weights W (o, i) gives sample n the logits ::

    f_n = f_n^- + s (W - W^-) x_n        W - W^- ~ N(0, B (x) A)        y_n ~ softmax(f_n), counted 1 / r times

**The mean** is the mode of this posterior. With A = L_A L_A^T, B = L_B L_B^T and z_n = s L_A^T x_n it is the U that
minimises ``sum_n -log softmax(f_n^- + L_B U z_n)_{y_n} / r + |U|^2 / 2``, which is convex. Each linearisation is an
iterated-EKF step (Bell and Cathey 1993), for a softmax the same as Newton's. Its S has (N o)^2 numbers; so S w = nu is
solved by conjugate gradients, and S never formed. A step that raises the objective is halved.

**The covariance** at the mode has the precision ``B^-1 (x) A^-1 + sum_n s^2 / r H_n (x) x_n x_n^T``, with
H_n = diag(p_n) - p_n p_n^T. The product B' (x) A' nearest to it (least KL divergence from the product) solves ::

    i B'^-1 = tr(A^-1 A') B^-1 + s^2 / r sum_n (x_n^T A' x_n) H_n
    o A'^-1 = tr(B^-1 B') A^-1 + s^2 / r sum_n tr(H_n B') x_n x_n^T

by sweeps, each of which can only lessen the divergence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from kngd_ray.errors import FilterError
from kngd_ray.filters.dense import root, symmetric

_DOUBLE = 1 << 24  # numbers of logits times features below which float64 costs little
_HALVINGS = 30
_PRODUCTS = 400  # of the Hessian with a direction, at most in a linearisation
_FORCING = 0.1  # how much of the gradient conjugate gradients may leave, less as it falls
_LEAST = 1e-12  # probability
_ROUNDED = 1e-12  # of the objective: float64 sums of many terms
_RANK = 1e-12  # of the largest variance of a feature: below, a direction is rounding
_SWEEPS = 30
_SETTLED = 1e-10  # relative change of the variances in a sweep


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
    wide = torch.float64 if batch.logits.numel() * min(len(A), len(batch.x)) <= _DOUBLE else B.dtype
    x, columns, rows = batch.x.to(wide), A.to(wide), B.to(wide)
    found = _mode(_principal(batch.scale * x, columns), _Rows.of(rows), batch, tolerance, linearisations)
    # At the mode W - W^- = P H^T w with w = y - p: all that is left of the iterations is the residual.
    residual = one_hot(batch.labels, len(B)).to(wide) - found.probabilities
    step = (batch.scale / batch.noise) * (rows @ (residual.mT @ (x @ columns)))
    B_new, A_new, shrunk = nearest_product(B, A, batch, found.probabilities)
    p_label = found.probabilities.double().gather(1, batch.labels.unsqueeze(1)).clamp_min(_LEAST)
    return SoftmaxPosterior(
        step.to(B.dtype),
        B_new.to(B.dtype).contiguous(),  # in the order in which a checkpoint is read back: products then round alike
        A_new.to(A.dtype).contiguous(),
        shrunk - found.objective,
        2 * found.distance + float((1 / p_label - 1).sum()) / batch.noise,
        found.linearisations,
        found.settled,
    )


def modes(
    variances: Sequence[float], A: Tensor, batch: Classified, x: Tensor, *, tolerance: float, linearisations: int
) -> Iterator[Tensor]:
    """What is learned from a batch under several prior variances, as the logits of other inputs.

    Args:
        variances: v of B = v I, ascending: each mode is begun at the one before.
        A: (i, i) covariance of columns.
        batch: what is observed.
        x: (k, i) other inputs.
        tolerance: of a logit of the batch, nats.
        linearisations: at most.

    Yields:
        (k, o) by which their logits move from the predicted mean, for each variance.
    """
    known, other = (batch.scale * inputs.double() for inputs in (batch.x, x))
    columns = A.double()
    Z = _principal(known, columns)
    across = (other @ columns @ known.mT) @ (Z / Z.square().sum(0))
    U, before = None, 1.0
    for v in variances:
        root_v = torch.as_tensor(v, dtype=Z.dtype, device=Z.device).sqrt()
        start = None if U is None else U * (before / v) ** 0.5
        found = _mode(Z, _Rows(root_v), batch, tolerance, linearisations, start)
        U, before = found.U, v
        yield root_v * (across @ U.mT)


def nearest_product(B: Tensor, A: Tensor, batch: Classified, p: Tensor) -> tuple[Tensor, Tensor, float]:
    """The Kronecker product nearest to a softmax posterior, in float64.

    Args:
        B: (o, o) prior covariance of rows.
        A: (i, i) prior covariance of columns.
        batch: what is observed.
        p: (N, o) probabilities at the mode.

    Returns:
        B' (o, o), A' (i, i) with the trace of A, and half the log-determinant of the posterior over the prior, nats.
    """
    p, x = p.double(), batch.x.double()
    B0, A0 = B.double(), A.double()
    B_inverse, A_inverse = _inverse(B0), _inverse(A0)
    o, i = len(B), len(A)
    weight = batch.scale**2 / batch.noise
    B_new, A_new = B0, A0
    traced = float(i)  # tr(A^-1 A')
    for _ in range(_SWEEPS):
        q = weight * ((x @ A_new) * x).sum(1)
        curvature = torch.diag(q @ p) - (p * q.unsqueeze(1)).mT @ p
        B_new = _inverse((traced * B_inverse + curvature) / i)
        seen = weight * (p @ B_new.diagonal() - ((p @ B_new) * p).sum(1))  # tr(H_n B')
        precision = (B_inverse * B_new).sum() * A_inverse + (x * seen.unsqueeze(1)).mT @ x
        A_new = _inverse(precision / o)
        before, traced = traced, float((A_inverse * A_new).sum())
        if abs(traced - before) <= _SETTLED * abs(before):
            break
    scale = A0.diagonal().sum() / A_new.diagonal().sum()
    A_new, B_new = A_new * scale, B_new / scale
    log_det = i * (_log_det(B_new) - _log_det(B0)) + o * (_log_det(A_new) - _log_det(A0))
    return B_new, A_new, 0.5 * float(log_det)


@dataclass(frozen=True)
class _Mode:
    """Where Newton's method ended."""

    probabilities: Tensor
    U: Tensor
    objective: float
    distance: float  # |U|^2 / 2
    linearisations: int
    settled: bool


@dataclass(frozen=True)
class _Rows:
    """A root L_B of B: a matrix, or one number where B is a multiple of the identity, as before the first batch."""

    root: Tensor

    @classmethod
    def of(cls, B: Tensor) -> "_Rows":
        first = B[0, 0]
        if bool((first * torch.eye(len(B), dtype=B.dtype, device=B.device) == B).all()):
            return cls(first.sqrt())
        return cls(root(B))

    def logits(self, U: Tensor) -> Tensor:
        """(N, o) L_B u_n of rows u_n."""
        return U @ self.root.mT if self.root.dim() else U * self.root

    def back(self, cotangent: Tensor) -> Tensor:
        """(N, o) L_B^T g_n of rows g_n."""
        return cotangent @ self.root if self.root.dim() else cotangent * self.root

    def variances(self, weights: Tensor) -> Tensor:
        """(o,) diagonal of L_B^T diag(w) L_B."""
        return weights @ self.root.square() if self.root.dim() else weights * self.root.square()


def _mode(
    Z: Tensor, rows: _Rows, batch: Classified, tolerance: float, linearisations: int, start: Tensor | None = None
) -> _Mode:
    """Newton's method with halved steps.

    Args:
        Z: (N, r) whitened inputs in their principal axes.
        rows: the root of B.
        batch: labels, logits and noise.
        tolerance: of a logit, nats.
        linearisations: at most.
        start: (o, r) U to begin with; None is 0.
    """
    count = 1.0 / batch.noise
    target = one_hot(batch.labels, batch.logits.shape[1]).to(Z)
    logits = batch.logits.to(Z)
    U = Z.new_zeros(logits.shape[1], Z.shape[1]) if start is None else start
    if start is not None:
        logits = logits + rows.logits(Z @ U.mT)
    spread = Z.square().sum(0)  # Z^T Z is diagonal

    def objective(logits: Tensor, U: Tensor) -> tuple[float, float]:
        # in float64: close to the mode the difference is the last digits
        loss = count * cross_entropy(logits.double(), batch.labels, reduction="sum")
        loss_there, distance = torch.stack([loss, 0.5 * U.double().square().sum()]).tolist()
        return loss_there + distance, distance

    now, distance = objective(logits, U)
    for done in range(1, linearisations + 1):
        p = logits.softmax(1)
        gradient = count * rows.back(target - p).mT @ Z - U
        scale = 1 + torch.outer(rows.variances(count * (p * (1 - p)).mean(0)), spread)  # about the Hessian's diagonal
        direction = _solved(Z, rows, p, count, gradient, scale)
        moved = rows.logits(Z @ direction.mT)
        size = 1.0
        for _ in range(_HALVINGS):
            there, far = objective(logits + size * moved, U + size * direction)
            if there <= now + _ROUNDED * abs(now):
                break
            size /= 2
        else:  # nothing goes down any more: what is left is rounding
            return _Mode(p, U, now, distance, done, True)
        logits, U, now, distance = logits + size * moved, U + size * direction, there, far
        if size == 1.0 and float(moved.abs().max()) <= tolerance:
            return _Mode(logits.softmax(1), U, now, distance, done, True)
    return _Mode(logits.softmax(1), U, now, distance, linearisations, False)


def _solved(Z: Tensor, rows: _Rows, p: Tensor, count: float, gradient: Tensor, scale: Tensor) -> Tensor:
    """Solve (I + sum_n H_n (x) z_n z_n^T) d = gradient by conjugate gradients, scaled by an approximate diagonal."""
    found = torch.zeros_like(gradient)
    rest, eased = gradient.clone(), gradient / scale
    q = eased.clone()
    size = first = float((rest * eased).sum())
    enough = first * min(_FORCING, _FORCING * first**0.5) ** 2
    for _ in range(_PRODUCTS):
        if not size > enough:
            break
        along = rows.logits(Z @ q.mT)
        along = count * p * (along - (p * along).sum(1, keepdim=True))
        product = q + rows.back(along).mT @ Z
        step = size / float((q * product).sum())
        found += step * q
        rest -= step * product
        eased = rest / scale
        before, size = size, float((rest * eased).sum())
        q = eased + (size / before) * q
    return found


def _principal(x: Tensor, A: Tensor) -> Tensor:
    """Inputs whitened by A, in the principal axes of the batch.

    Args:
        x: (N, i) scaled inputs.
        A: (i, i) covariance of columns.

    Returns:
        (N, r) Z with Z Z^T = x A x^T and Z^T Z diagonal, r at most N and i.
    """
    if len(x) <= len(A):
        variances, axes = torch.linalg.eigh(symmetric(x @ A @ x.mT))
        kept = variances > _RANK * variances[-1]
        return axes[:, kept] * variances[kept].sqrt()
    z = x @ root(A)
    variances, axes = torch.linalg.eigh(symmetric(z.mT @ z))
    return z @ axes[:, variances > _RANK * variances[-1]]


def _inverse(P: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(symmetric(P)))


def _log_det(P: Tensor) -> float:
    return 2 * float(torch.linalg.cholesky(P).diagonal().log().sum())
