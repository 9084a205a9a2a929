r"""The mode of linear softmax classifiers under Gaussian priors, by Newton's method: several of one shape at once.

With z_n the whitened inputs (A = L_A L_A^T, z_n = s L_A^T x_n) and B = L_B L_B^T, it is the U (C, r) that minimises ::

    sum_n -c_n log softmax(f_n + L_B U z_n)_{y_n} + |U|^2 / 2

which is convex. Each linearisation is an iterated-EKF step (Bell and Cathey 1993), for a softmax the same as Newton's.
Its S has (N C)^2 numbers; so the step is found by conjugate gradients, and S never formed. A step that raises the
objective is halved, and one that would move a logit so far that the softmax saturates is shortened. A step within the
tolerance can raise the objective by rounding alone: it is not taken, and its problem is at its mode.

Directions are computed in float32, which costs half, and their outcomes in the problem's own precision. So rounding
slows the last steps down a little, but the mode is as exact as the problem is given.

A linearisation reads one small tensor back to the host, whether the problem is on a GPU or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kngd_ray._deferred import Tensor, functional, torch
from kngd_ray.filters.dense import root, symmetric

_HALVINGS = 30
_REACH = 16.0  # nats by which a step moves a logit at most: the linearisation says nothing beyond
_PRODUCTS = 400  # of the Hessian with a direction, at most in a linearisation
_UNREAD = 5  # of them to begin with on a GPU, where asking after each whether they suffice costs more than they do
_FORCING = 0.5  # how much of the gradient conjugate gradients may leave, less as it falls
_FINEST = 1e-3  # of it, at the least: float32 knows no more
_COARSEST = 0.1  # of it, where the mode itself is asked for no more exactly
_ROUNDED = 16  # units in the last place by which an objective that stands still may rise
_RANK = 1e-12  # of the largest variance of a feature: below, a direction is rounding; in float32 16 of its units


class RowRoot:
    """A root L_B of a covariance of rows B.

    Args:
        root: (C, C) L_B; or a scalar, where B is a multiple of the identity.
    """

    def __init__(self, root: Tensor) -> None:
        self._root = root

    @classmethod
    def of(cls, B: Tensor) -> "RowRoot":
        """From (C, C) B; before the first batch it is a multiple of the identity, which saves most of the work."""
        first = B[0, 0]
        if bool((first * torch.eye(len(B), dtype=B.dtype, device=B.device) == B).all()):
            return cls(first.sqrt())
        return cls(root(B))

    @property
    def number(self) -> Tensor | None:
        """The root, where it is a scalar."""
        return None if self._root.dim() else self._root

    def to(self, dtype: "torch.dtype") -> "RowRoot":
        """The same in another precision."""
        return RowRoot(self._root.to(dtype))

    def logits(self, u: Tensor) -> Tensor:
        """(..., C) L_B u_n of rows u_n."""
        return u @ self._root.mT if self._root.dim() else u * self._root

    def back(self, cotangent: Tensor) -> Tensor:
        """(..., C) L_B^T g_n of rows g_n."""
        return cotangent @ self._root if self._root.dim() else cotangent * self._root


@dataclass(frozen=True)
class Problem:
    """F problems of one size, in which some samples may count for nothing.

    Attributes:
        Z: (F, N, r) whitened inputs in their principal axes: Z^T Z is diagonal.
        logits: (F, N, C) at the predicted mean.
        labels: (F, N) int64 classes.
        counts: (F, N) how often each sample counts, 1 / its noise.
    """

    Z: Tensor
    logits: Tensor
    labels: Tensor
    counts: Tensor

    def to(self, dtype: "torch.dtype") -> "Problem":
        """The same in another precision."""
        return Problem(self.Z.to(dtype), self.logits.to(dtype), self.labels, self.counts.to(dtype))

    @classmethod
    def stacked(cls, parts: Sequence["Problem"]) -> "Problem":
        """Several as one; samples and axes that some lack count for nothing, or are zero."""
        r = max(part.Z.shape[2] for part in parts)
        padded = [torch.nn.functional.pad(part.Z, (0, r - part.Z.shape[2])) for part in parts]
        return cls(
            *(
                torch.nn.utils.rnn.pad_sequence([row for part in of_parts for row in part], batch_first=True)
                for of_parts in (
                    padded,
                    [part.logits for part in parts],
                    [part.labels for part in parts],
                    [part.counts for part in parts],
                )
            )
        )


@dataclass(frozen=True)
class Mode:
    """Where Newton's method ended.

    Attributes:
        U: (F, C, r).
        log_p: (F, N, C) log-probabilities.
        objective: (F,) float64.
        distance: (F,) |U|^2 / 2.
        linearisations: how many were made.
        settled: whether the last step of each moved no logit by more than the tolerance.
    """

    U: Tensor
    log_p: Tensor
    objective: Tensor
    distance: Tensor
    linearisations: int
    settled: bool


@dataclass(frozen=True)
class Whitened:
    """Inputs of a layer in coordinates in which their weights are independent a priori, of variance 1.

    They are the principal axes of the batch: where there are few inputs, nothing of their length is left.

    Attributes:
        Z: (N, r) inputs, r at most N and i; Z Z^T = x A x^T, and Z^T Z is diagonal.
        K: (N, N) x A x^T; None where there are more samples than inputs.
        back: the way back to weights: x A (N, i), or where there are more samples than inputs Y (r, i), Z Y = x A.
    """

    Z: Tensor
    K: Tensor | None
    back: Tensor

    @classmethod
    def of(cls, x: Tensor, A: Tensor) -> "Whitened":
        """From (N, i) inputs and the covariance of columns (i, i), in their precision."""
        rank = max(_RANK, 16 * torch.finfo(x.dtype).eps)
        if len(x) <= len(A):
            xA = x @ A
            K = symmetric(xA @ x.mT)
            variances, axes = torch.linalg.eigh(K)
            kept = _kept(variances, rank)
            return cls(axes[:, kept] * variances[kept].clamp_min(0).sqrt(), K, xA)
        L = root(A)
        z = x @ L
        variances, axes = torch.linalg.eigh(symmetric(z.mT @ z))
        axes = axes[:, _kept(variances, rank)]
        return cls(z @ axes, None, (L @ axes).mT)

    def others(self, x: Tensor) -> Tensor:
        """(M, r) other inputs x (M, i) in the same coordinates."""
        seen = x @ self.back.mT
        return (
            seen if self.K is None else seen @ (self.Z / self.Z.square().sum(0).clamp_min(torch.finfo(seen.dtype).tiny))
        )

    def weights(self, w: Tensor) -> Tensor:
        """(o, i) w x A of weights w (o, N) of the samples."""
        return (w @ self.Z) @ self.back if self.K is None else w @ self.back


def mode(
    problem: Problem, rows: RowRoot, *, tolerance: float, linearisations: int, start: Tensor | None = None
) -> Mode:
    """Find the modes, by Newton's method with halved steps.

    Args:
        problem: what is observed.
        rows: the root of B, in the precision of the problem.
        tolerance: of a logit, nats.
        linearisations: at most.
        start: (F, C, r) U to begin with; None is 0.

    Returns:
        The modes.
    """
    Z, counts, F = problem.Z, problem.counts.unsqueeze(2), len(problem.Z)
    labels, weights = problem.labels.unsqueeze(2), problem.counts.double().unsqueeze(2)
    target = functional.one_hot(problem.labels, problem.logits.shape[2]).to(Z.dtype)
    logits = problem.logits
    U = Z.new_zeros(F, logits.shape[2], Z.shape[2]) if start is None else start
    if start is not None:
        logits = logits + rows.logits(Z @ U.mT)
    linear = _Linear.of(problem, rows)
    finest = min(max(tolerance, _FINEST), _COARSEST)
    rounded = _ROUNDED * torch.finfo(Z.dtype).eps

    def costs(logits: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(F, N, C) log-probabilities, and objective and distance (F,), summed in float64: they differ by digits."""
        log_p = logits.log_softmax(2)
        distance = 0.5 * U.double().square().sum((1, 2))
        return log_p, distance - (weights * log_p.gather(2, labels)).sum((1, 2)), distance

    log_p, cost, distance = costs(logits, U)
    on_cpu = Z.device.type == "cpu"
    products = _PRODUCTS if on_cpu else _UNREAD
    settled, done = False, 0
    while done < linearisations and not settled:
        done += 1
        p = log_p.exp()
        gradient = rows.back(counts * (target - p)).mT @ Z - U
        direction, unsolved = linear.solve(p, gradient, products, finest, stops=on_cpu)
        moved = rows.logits(Z @ direction.mT)
        reach = moved.abs().amax((1, 2))
        size = (_REACH / reach).clamp(max=1.0).view(F, 1, 1)
        limit = cost * (1 + rounded)
        for _ in range(_HALVINGS):
            there, far = logits + size * moved, U + size * direction
            there_log_p, there_cost, there_distance = costs(there, far)
            rise = there_cost - limit
            most = torch.stack([rise.amax(), reach.amax().double(), unsolved.amax().double()]).tolist()
            if most[0] <= 0:
                logits, U, log_p, cost, distance = there, far, there_log_p, there_cost, there_distance
                # a direction that was cut short says nothing of how far the mode is
                whole = most[2] <= 0 or products == _PRODUCTS
                settled = most[1] <= tolerance and whole
                break
            shorter = torch.where(reach <= tolerance, 0, size.flatten() / 2)
            size = torch.where(rise <= 0, size.flatten(), shorter).view(F, 1, 1)
        else:  # some do not go down any more: only rounding is left of them, and they stay
            falls = rise.view(F, 1, 1) <= 0
            logits, U = torch.where(falls, there, logits), torch.where(falls, far, U)
            log_p, cost, distance = costs(logits, U)
            settled = bool(((rise > 0) | (reach <= tolerance)).all())
        if most[2] > 0:
            products = min(2 * products, _PRODUCTS)
    return Mode(U, log_p, cost, distance, done, settled)


@dataclass(frozen=True)
class _Linear:
    """The linearised problem in float32, (I + sum_n c_n H_n (x) z_n z_n^T) d = gradient with H_n of p_n."""

    Z: Tensor  # (F, N, r), times the root of B where it is a number
    rows: RowRoot | None  # that of B where it is a matrix
    counts: Tensor

    @classmethod
    def of(cls, problem: Problem, rows: RowRoot) -> "_Linear":
        number = rows.number
        Z = (problem.Z if number is None else problem.Z * number).float()
        left = rows.to(Z.dtype) if number is None else None
        return cls(Z, left, problem.counts.to(Z).unsqueeze(2))

    def solve(self, p: Tensor, gradient: Tensor, products: int, finest: float, *, stops: bool) -> tuple[Tensor, Tensor]:
        """Conjugate gradients, of which whitening is the preconditioner.

        Near a mode few samples bend the objective, along a few of a class's directions, and in all others it is the
        prior's. The Hessian's diagonal knows no directions, and takes up to four times as many products.

        Args:
            p: (F, N, C) probabilities.
            gradient: (F, C, r).
            products: with the Hessian, at most.
            finest: the smallest part of the gradient that is asked to be left, near a mode.
            stops: whether to stop before, as soon as they suffice; asking takes a read for each.

        Returns:
            (F, C, r) direction, more exact the smaller its gradient; and by how much it falls short, 0 or less if not.
        """
        p = p.float()
        weighed = self.counts * p
        # the direction does not depend on the gradient's size, of which float32 has no sum of squares near a mode
        unit = gradient.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        along = rest = (gradient / unit).float()
        found = torch.zeros_like(rest)
        size = _dot(rest, rest)
        enough = size * (_FORCING * (size.sqrt() * unit.float()).clamp(finest / _FORCING, 1)).square()
        least = torch.finfo(torch.float32).tiny
        for _ in range(products):  # fifteen kernels each: more than anything else a GPU waits for their launch
            if stops and not bool((size > enough).any()):
                break
            moved = self.Z @ along.mT
            moved = moved if self.rows is None else self.rows.logits(moved)
            curved = weighed * (moved - (p * moved).sum(2, keepdim=True))
            curved = curved if self.rows is None else self.rows.back(curved)
            product = torch.baddbmm(along, curved.mT, self.Z)
            step = size / _dot(along, product).clamp_min(least)
            found, rest = torch.addcmul(found, step, along), torch.addcmul(rest, step, product, value=-1)
            before, size = size.clamp_min(least), _dot(rest, rest)
            along = torch.addcmul(rest, size / before, along)
        return found.to(gradient.dtype) * unit, size - enough


def _kept(variances: Tensor, rank: float) -> Tensor:
    """Which axes (n,) inputs extend along, by their ascending variances: the last always, though inputs may be zero."""
    kept = variances > rank * variances[-1]
    kept[-1] = True
    return kept


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(F, 1, 1) products of (F, C, r) matrices, each as one vector."""
    return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2))
