"""One dense covariance per block of weights: a few rows of a matrix, or a piece of a row.

Blocks are runs of b consecutive weights of a layer (o, i), b at most `size` ::

    i <= size     b = i (size // i)                whole rows
    i >  size     b = ceil(i / ceil(i / size))     pieces of a row, all equal where that divides i

Where it does not, a block reaches over the end of a row. The last block of a layer may be shorter.

Update, exact except for the covariance between blocks, which it drops; all blocks at once ::

    U = P H^T      S = H U + I      P <- P - U S^-1 U^T
"""

from dataclasses import dataclass
from math import lcm
from typing import Any, Literal

from kngd_ray._deferred import Generator, Tensor, functional, torch
from kngd_ray.filters._innovation import Innovation
from kngd_ray.filters._layerwise import LayerState, Layerwise
from kngd_ray.filters.dense import root, rounded_up, symmetric
from kngd_ray.filters.jacobian import Factors, Layer, Part, Rows

_COVARIANCE = "covariance"


@dataclass(frozen=True, kw_only=True)
class BlockDiagonal(Layerwise):
    """P as (size, b) for each layer, row j for weight j in its block, in the weights' dtype, float32 or better.

    Attributes:
        kind: the family's name.
        size: weights of a block, at most.
    """

    kind: Literal["block_diagonal"] = "block_diagonal"
    size: int = 64

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; a block holds at least 1 weight")

    def block(self, layer: Layer) -> int:
        """Weights of each block of the layer, except perhaps the last."""
        if layer.i <= self.size:
            return min(layer.i * (self.size // layer.i), layer.size)
        return -(-layer.i // -(-layer.i // self.size))

    def grain(self, layer: Layer) -> int:
        """The fewest rows that end where a block does."""
        return min(lcm(self.block(layer), layer.i) // layer.i, layer.o)

    def cost(self, layer: Layer) -> int:
        """One row of a block per weight."""
        return layer.size * self.block(layer)

    def init_layer(self, part: Part, p0: float, like: Tensor) -> LayerState:
        """(size, b) p0 where a weight meets itself."""
        dtype, b = torch.promote_types(like.dtype, torch.float32), self.block(part.layer)
        rows = torch.eye(b, dtype=dtype, device=like.device).repeat(-(-part.size // b), 1)
        return {_COVARIANCE: p0 * rows[: part.size]}

    def predict_layer(self, P: LayerState, scale: float, q: float) -> LayerState:
        """(size, b) scale * P + q I."""
        predicted = _blocks(P) * scale
        predicted.diagonal(dim1=1, dim2=2).add_(q)
        return {_COVARIANCE: _by_weight(predicted, P)}

    def gram_layer(self, P: LayerState, H: Factors | Rows) -> tuple[Tensor, Any]:
        """(M, M) H P H^T, and U^T by blocks (blocks, M, b)."""
        blocks = _blocks(P)
        h = _by_block(H.rows().to(blocks.dtype), blocks)
        U = h @ blocks
        return torch.tensordot(h, U, ([0, 2], [0, 2])), U

    def work_layer(self, P: LayerState, H: Factors | Rows) -> Any:
        """U^T by blocks (blocks, M, b)."""
        blocks = _blocks(P)
        return _by_block(H.rows().to(blocks.dtype), blocks) @ blocks

    def gain_layer(self, P: LayerState, H: Factors | Rows, work: Any, weights: Tensor) -> Tensor:
        """(size,) U w."""
        return (weights.to(work.dtype) @ work).reshape(-1)[: len(P[_COVARIANCE])]

    def update_layer(self, P: LayerState, H: Factors | Rows, work: Any, innovation: Innovation) -> LayerState:
        """(size, b) posterior inside each block, symmetric to the last bit."""
        blocks = _blocks(P)
        count, M, b = work.shape
        columns = work.transpose(0, 1).reshape(M, count * b)  # one system, not one for each block
        X = torch.linalg.solve_triangular(innovation.cholesky.to(work.dtype), columns, upper=False)
        X = X.view(M, count, b).transpose(0, 1)
        posterior = torch.baddbmm(blocks, X.mT, X, alpha=-1.0)
        posterior = rounded_up(symmetric(posterior), blocks)
        return {_COVARIANCE: _by_weight(posterior, P)}

    def sample_layer(self, P: LayerState, draws: int, generator: Generator) -> Tensor:
        """(draws, size) z L^T in each block, P = L L^T."""
        blocks = _blocks(P)
        z = torch.randn(draws, *blocks.shape[:2], dtype=blocks.dtype, generator=generator).to(blocks.device)
        return (root(blocks) @ z.unsqueeze(-1)).flatten(1)[:, : len(P[_COVARIANCE])]

    def diagonal_layer(self, P: LayerState) -> Tensor:
        """(size,) marginal variances."""
        return _blocks(P).diagonal(dim1=1, dim2=2).reshape(-1)[: len(P[_COVARIANCE])]

    def log_det_layer(self, P: LayerState) -> Tensor:
        """Sum over blocks."""
        return torch.linalg.slogdet(_blocks(P)).logabsdet.sum()


def _blocks(P: LayerState) -> Tensor:
    """(blocks, b, b); a shorter last block is filled up with uncorrelated weights of variance 1 that no H sees."""
    rows = P[_COVARIANCE]
    b = rows.shape[1]
    missing = -len(rows) % b
    if missing:
        rows = functional.pad(rows, (0, 0, 0, missing))
        rows[-missing:, -missing:].diagonal().fill_(1.0)
    return rows.view(-1, b, b)


def _by_block(rows: Tensor, blocks: Tensor) -> Tensor:
    """(blocks, M, b) from rows (M, size)."""
    count, b, _ = blocks.shape
    return functional.pad(rows, (0, count * b - rows.shape[1])).view(-1, count, b).transpose(0, 1)


def _by_weight(blocks: Tensor, P: LayerState) -> Tensor:
    """(size, b) rows of the blocks, with P's size."""
    return blocks.flatten(0, 1)[: len(P[_COVARIANCE])]
