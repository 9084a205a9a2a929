"""The innovation of one update: Cholesky of S, the gain weights, evidence and NIS."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite, log, pi
from random import Random
from typing import Any

from kngd_ray._deferred import Tensor, torch
from kngd_ray.errors import FilterError, IndefiniteError
from kngd_ray.filters.functional_mode import eager

_JITTER_STEPS = 6


@dataclass(frozen=True)
class Innovation:
    """What one update learns from its innovation ``nu ~ N(0, S)``.

    Attributes:
        cholesky: (M, M) lower factor L of S = L L^T, in S's dtype.
        weights: (M,) w = S^-1 nu; the mean moves by P H^T w.
        log_evidence: log N(nu; 0, S) in nats, summed over the M observations; in functional mode a float64 scalar.
        nis: normalised innovation squared nu^T S^-1 nu, expected value M; likewise.
        jitter: what had to be added to the diagonal of S before it would factor; normally 0.
        seed: of the signs that estimates draw; the same on every rank, and different at each update.
        drawn: (draws, M) those signs, where many trials advance together, each with its own; None draws by the seed.
    """

    cholesky: Tensor
    weights: Tensor
    log_evidence: float
    nis: float
    jitter: float
    seed: int = 0
    drawn: Tensor | None = None

    @cached_property
    def inverse(self) -> Tensor:
        """(M, M) S^-1 in float64: M is small, and what is computed from it loses digits."""
        return torch.cholesky_inverse(self.cholesky.double())

    @cached_property
    def inverse_root(self) -> Tensor:
        """(M, M) L^-1 in float64: its product with rows is faster than a triangular solve with as many columns."""
        L = self.cholesky.double()
        return torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)

    def signs(self, draws: int) -> Tensor:
        """(draws, M) signs z, a function of the seed alone, with E[z z^T] = I, in float64."""
        if self.drawn is not None:
            return self.drawn
        return random_signs(self.seed, draws, len(self.weights), self.weights.device)

    def probes(self, draws: int) -> Tensor:
        """(draws, M) rows p = L^-T z of :meth:`signs`, with E[p p^T] = S^-1, in float64."""
        return self.signs(draws) @ self.inverse_root

    def whiten(self, U: Tensor) -> Tensor:
        """Solve ``X L^T = U``, so that ``X X^T = U S^-1 U^T``.

        Args:
            U: (n, M) cross-covariance P H^T of any slice of the parameters.

        Returns:
            (n, M) whitened cross-covariance U L^-T.
        """
        return torch.linalg.solve_triangular(self.cholesky.mT.to(U.dtype), U, upper=True, left=False)


@lru_cache(maxsize=8)
def random_signs(seed: int, draws: int, M: int, device: "torch.device") -> Tensor:
    """Independent random signs; every layer and linearisation of an update asks for the same.

    Args:
        seed: what determines them.
        draws: rows.
        M: observations.
        device: where they are.

    Returns:
        (draws, M) float64, not to be written to.
    """
    bits = Random(seed).getrandbits(max(draws * M, 1))  # noqa: S311 - torch draws nothing under vmap
    signs = [float((bits >> n & 1) * 2 - 1) for n in range(draws * M)]
    return torch.tensor(signs, dtype=torch.float64, device=device).view(draws, M)


def solve_innovation(S: Tensor, nu: Tensor) -> Innovation:
    """Factor S once and derive from it all that an update needs.

    An S that has lost positive definiteness to rounding gets a growing jitter on its diagonal,
    from the dtype's epsilon times the mean variance up to 1e5 times that.

    Args:
        S: (M, M) symmetric innovation covariance H P H^T + I.
        nu: (M,) innovations y - h(mu).

    Returns:
        The factored innovation.

    Raises:
        FilterError: nu or S is not finite.
        IndefiniteError: S stays indefinite under the largest jitter.
    """
    L, info = torch.linalg.cholesky_ex(S)
    jitter = 0.0
    if not eager():
        L = torch.where(info == 0, L, torch.nan)
        weights, figures = _solved(L, nu)
        nis, half_log_det = _as_floats(figures)
    else:
        weights, figures = _solved(L, nu)
        # One read for all that is looked at, which a GPU waits for. A sum is finite only if its terms are.
        sums = [nu.sum().double() + S.sum().double(), info.double(), *figures.unbind()]
        total, failed, nis, half_log_det = torch.stack(sums).tolist()
        if not isfinite(total):
            _refuse(S, nu)
        if failed:
            L, jitter = _jittered(S)
            weights, figures = _solved(L, nu)
            nis, half_log_det = figures.tolist()
    return Innovation(L, weights, -0.5 * (nis + nu.numel() * log(2.0 * pi)) - half_log_det, nis, jitter)


def _solved(L: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) S^-1 nu, and (2,) float64: nu^T S^-1 nu and half the logarithm of the determinant of S."""
    nu = nu.to(L.dtype)
    weights = torch.cholesky_solve(nu.unsqueeze(1), L).squeeze(1)
    return weights, torch.stack([nu @ weights, L.diagonal().log().sum()]).double()


def _as_floats(figures: Tensor) -> Any:
    """Numbers that stay tensors, for many trials at once: arithmetic on them is as on floats."""
    return figures.unbind()


def _jittered(S: Tensor) -> tuple[Tensor, float]:
    """The Cholesky factor of S with the least jitter that lets it factor, and the jitter.

    Raises:
        IndefiniteError: none does.
    """
    M = len(S)
    unit = torch.finfo(S.dtype).eps * max(float(S.diagonal().mean()), torch.finfo(S.dtype).tiny)
    jitter = 0.0
    for power in range(_JITTER_STEPS):
        jitter = unit * 10.0**power
        L, info = torch.linalg.cholesky_ex(S + jitter * torch.eye(M, dtype=S.dtype, device=S.device))
        if int(info) == 0:
            return L, jitter
    raise IndefiniteError(
        f"the innovation covariance S ({M} x {M}) is not positive definite, even with {jitter:.1e} added to its "
        "diagonal: raise the observation noise (observation.r0) or lower filter.p0."
    )


def _refuse(S: Tensor, nu: Tensor) -> None:
    """Say which of the two is not finite; sums of huge but finite numbers pass.

    Raises:
        FilterError: one is not.
    """
    if not bool(torch.isfinite(nu).all()):
        bad = int((~torch.isfinite(nu)).sum())
        raise FilterError(
            f"{bad} of {nu.numel()} innovations are NaN or infinite: the step was refused and the belief kept; "
            "look for non-finite features, or lower filter.p0."
        )
    if not bool(torch.isfinite(S).all()):
        raise FilterError(
            "the innovation covariance S is NaN or infinite: the step was refused and the belief kept; "
            "lower filter.p0 or the process noise."
        )
