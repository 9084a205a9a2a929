r"""LO-FI: a precision that is diagonal plus low-rank (Chang et al., arXiv 2305.19535).

    P^-1 = diag(lam) + W W^T        W (n, r)

All layers share the columns of W, yet each weight has its own row of W and its own entry of lam. So parts of P may lie
anywhere, and only sums of a few columns over them are needed. By Woodbury, with C = I + W^T lam^-1 W ::

    P = lam^-1 - lam^-1 W C^-1 W^T lam^-1

Update. With A = [H; W^T] (M + r, n) the sums G0 = A lam^-1 A^T and G1 = A A^T are all that parts need from one another;
h and w are their blocks ::

    H P H^T     = G0_hh - G0_hw (I + G0_ww)^-1 G0_wh
    P H^T v     = lam^-1 (H^T v - W (I + G0_ww)^-1 G0_wh v)
    P^-1 + H^T H = diag(lam) + A^T A

The r leading eigenvectors of A^T A are kept, A^T V for the leading V of G1, and what the others contributed to the
diagonal is returned to it. The diagonal of the precision is therefore exact, and all of the precision is until W is
full ::

    W <- A^T V        lam <- lam + rowsum((A^T)^2) - rowsum(W^2)

Predict, exact as well. With D = scale / lam + q, scale P + q I = D - scale lam^-1 W C^-1 W^T lam^-1, and by Woodbury ::

    (scale P + q I)^-1 = D^-1 + D^-1 lam^-1 W (C / scale - W^T lam^-1 D^-1 lam^-1 W)^-1 W^T lam^-1 D^-1
    d = scale + q lam      lam <- lam / d      W <- d^-1 W F,   F F^T = scale (I + q W^T d^-1 W)^-1

since D = d / lam, and I + W^T lam^-1 W - scale W^T (lam d)^-1 W = I + q W^T d^-1 W: one sum of (r, r) over all parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from kngd_ray._deferred import Generator, Tensor, torch
from kngd_ray.filters._family import Covariance, Work
from kngd_ray.filters._innovation import Innovation
from kngd_ray.filters._layerwise import LayerState
from kngd_ray.filters.diagonal import column_energies
from kngd_ray.filters.functional_mode import eager
from kngd_ray.filters.jacobian import Factors, Jacobian, Layer, Part, Rows


@dataclass(frozen=True, kw_only=True)
class DiagonalLowRank:
    """P^-1 as lam (size,) and W (size, r) for each layer, in the weights' dtype but never below float32.

    Attributes:
        kind: the family's name.
        rank: r, the directions in which weights are correlated.
    """

    joint: ClassVar[bool] = False
    signs: ClassVar[int] = 0

    kind: Literal["diagonal_low_rank"] = "diagonal_low_rank"
    rank: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; a low-rank precision has at least 1 direction")

    def grain(self, layer: Layer) -> int:
        """One row: weights meet in sums only."""
        return 1

    def cost(self, layer: Layer) -> int:
        """One precision and r loadings per weight."""
        return layer.size * (self.rank + 1)

    def init(self, parts: Sequence[Part], p0: float, like: Tensor) -> Covariance:
        """Precision 1 / p0, no directions yet."""
        new = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        return {
            part.layer.name: {
                "precision": new.new_full((part.size,), 1.0 / p0),
                "factor": new.new_zeros(part.size, self.rank),
            }
            for part in parts
        }

    def predict(self, P: Covariance, scale: float, q: float, total: Callable[[Tensor], Tensor]) -> Covariance:
        """Precision of scale * P + q I, of the same form."""
        if eager() and scale == 1.0 and q == 0.0:
            return P
        C = torch.eye(self.rank, dtype=torch.float64)
        if not eager() or q > 0:
            shares = [(W.mT @ (W / (scale + q * lam).unsqueeze(1))).double() for lam, W in map(_parts, P.values())]
            C = C.to(shares[0].device) if shares else C
            C = C + q * total(sum(shares, torch.zeros_like(C))).to(C.device)
        half = torch.linalg.cholesky(C / scale)

        def predicted(lam: Tensor, W: Tensor) -> LayerState:
            d = scale + q * lam
            factor = torch.linalg.solve_triangular(half.mT.to(W), W / d.unsqueeze(1), upper=True, left=False)
            return {"precision": lam / d, "factor": factor}

        return {name: predicted(*_parts(state)) for name, state in P.items()}

    def gram(self, P: Covariance, H: Jacobian, nu: Tensor) -> tuple[Tensor, Work]:
        """(2, M + r, M + r) G0 and G1."""
        size = len(nu) + self.rank
        # float64: Woodbury's differences cancel where observations are many times more certain than the prior
        gram = nu.new_zeros(2, size, size, dtype=torch.float64)
        for name, state in P.items():
            A = _stacked(state, H[name]).double()
            gram = gram + torch.stack([(A / state["precision"]) @ A.mT, A @ A.mT])
        return gram, {}

    def spread(self, gram: Tensor, M: int) -> Tensor:
        """(M, M) H P H^T by Woodbury."""
        G0 = gram[0]
        X = torch.linalg.solve_triangular(self._root(G0, M), G0[M:, :M], upper=False)
        return G0[:M, :M] - X.mT @ X

    def gain(self, P: Covariance, H: Jacobian, gram: Tensor, work: Work, weights: Tensor) -> dict[str, Tensor]:
        """The parts of P H^T w by Woodbury."""
        M = len(weights)
        loads = torch.cholesky_solve((gram[0, M:, :M] @ weights.to(gram.dtype)).unsqueeze(1), self._root(gram[0], M))
        return {
            name: (H[name].combine(weights) - (W @ loads.to(W)).squeeze(1)) / lam
            for name, (lam, W) in ((name, _parts(state)) for name, state in P.items())
        }

    def update(self, P: Covariance, H: Jacobian, gram: Tensor, work: Work, innovation: Innovation) -> Covariance:
        """The r leading directions, and the exact diagonal of the precision."""
        leading = torch.linalg.eigh(gram[1].double()).eigenvectors[:, -self.rank :]

        def posterior(state: LayerState, h: Factors | Rows) -> LayerState:
            lam, W = _parts(state)
            factor = _stacked(state, h).mT @ leading.to(W)
            discarded = column_energies(h).to(lam.dtype) + W.square().sum(1) - factor.square().sum(1)
            return {"precision": lam + discarded.clamp_min(0), "factor": factor}

        return {name: posterior(state, H[name]) for name, state in P.items()}

    def sample(self, P: Covariance, draws: int, generator: Generator) -> Tensor:
        """(draws, n) P y, y from N(0, P^-1): sqrt(lam) z + W e."""
        lam, W = _joined(P)
        z = torch.randn(draws, len(lam) + self.rank, dtype=lam.dtype, generator=generator).to(lam.device)
        y = (z[:, : len(lam)] * lam.sqrt() + z[:, len(lam) :] @ W.mT) / lam
        loads = torch.cholesky_solve(W.mT @ y.mT, self._capacitance(lam, W)).mT
        return y - loads @ W.mT / lam

    def diagonal(self, P: Covariance) -> Tensor:
        """(n,) marginal variances."""
        lam, W = _joined(P)
        half = self._capacitance(lam, W)
        X = torch.linalg.solve_triangular(half.mT, W / lam.unsqueeze(1), upper=True, left=False)
        return 1.0 / lam - X.square().sum(1)

    def log_det(self, P: Covariance) -> Tensor:
        """Of P, by the determinant lemma."""
        lam, W = _joined(P)
        return -lam.log().sum() - 2.0 * self._capacitance(lam, W).diagonal().log().sum()

    def _capacitance(self, lam: Tensor, W: Tensor) -> Tensor:
        """Cholesky factor of C."""
        return self._root(W.mT @ (W / lam.unsqueeze(1)), 0)

    def _root(self, G0: Tensor, M: int) -> Tensor:
        """Cholesky factor of C = I + G0_ww."""
        C = G0[M:, M:].clone()
        C.diagonal().add_(1.0)
        return torch.linalg.cholesky(C)


def _parts(state: LayerState) -> tuple[Tensor, Tensor]:
    return state["precision"], state["factor"]


def _joined(P: Covariance) -> tuple[Tensor, Tensor]:
    """L and W of all layers."""
    return torch.cat([state["precision"] for state in P.values()]), torch.cat([x["factor"] for x in P.values()])


def _stacked(state: LayerState, H: Factors | Rows) -> Tensor:
    """The layer's A = [H; W^T] (M + r, size)."""
    W = state["factor"]
    return torch.cat([H.rows().to(W.dtype), W.mT])
