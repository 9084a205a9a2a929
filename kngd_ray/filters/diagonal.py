r"""One variance per weight, with two ways to come back to a diagonal after an update.

Both move the mean with the full gain, ``mu + P H^T S^-1 nu`` with ``S = H P H^T + I``; they differ
in which diagonal stands for the posterior (Chang et al., arXiv 2305.19535):

``ekf`` (FD-EKF)
    the diagonal of the exact posterior covariance, the minimiser of KL(posterior || diagonal)::

        P <- P - P^2 diag(H^T S^-1 H)

``vdekf`` (VD-EKF)
    the diagonal of the exact posterior precision, the minimiser of KL(diagonal || posterior)::

        1/P <- 1/P + diag(H^T H)

    additive over the observations and positive by construction; it is never larger than ``ekf``'s.

With factors, h_m = g_m (x) x_m, no row is formed. P (o, i) as a matrix, over pairs a, b of samples ::

    S_ab             = (g_a * g_b)^T P (x_a * x_b)
    diag(H^T S^-1 H) = sum_ab (S^-1)_ab (g_a * g_b) (x_a * x_b)^T

each a product over the s(s+1)/2 different pairs: M^2 n multiply-adds in all, the floor of an exact update, and no array
of n numbers is written except the result. k observations of a sample share x, and cost no more.

With T tokens a row is a sum of T outer products. Pairs of tokens would take (s T)^2 n multiply-adds; rows take
M T n to form and M^2 n to use, which is fewer for all T > 1, except for a few tokens of very many observations. So rows
are formed for one tile c of the weight at a time, which fits a budget, once for S and once for the update ::

    S += h_c P_c h_c^T        diag(H^T S^-1 H)_c = sum of squares of the columns of L^-1 h_c,  S = L L^T

``samples=q`` replaces that sum of M squares by the mean of q: with random signs z, E[(H^T L^-T z)^2] is the
diagonal of H^T S^-1 H, and E[(H^T z)^2] is the diagonal of H^T H. S itself, and with it the mean, stays exact. M^2 n
becomes q M n, and where q is less than k (or T = 1) no row is formed. An estimate e of ``ekf``'s information may exceed
1/P. A variance clamped there would be lost for good, so the posterior is taken as ::

    P <- P / (1 + e P)

which lies above 0 whatever e is, and by Jensen's inequality above P (1 - E[e] P) on average: estimates never make the
filter more certain than ``ekf``. The two forms differ by (e P)^2, and sum_j P_j diag(H^T S^-1 H)_j = tr(I - S^-1) < M:
for n weights, e P is M / n on average. So nothing is lost where n is large, and that is where samples are used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from kngd_ray._deferred import Generator, Tensor, torch
from kngd_ray.filters._innovation import Innovation
from kngd_ray.filters._layerwise import LayerState, Layerwise
from kngd_ray.filters._slices import Slices
from kngd_ray.filters.functional_mode import eager
from kngd_ray.filters.jacobian import Factors, Layer, Part, Rows

_VARIANCE = "variance"
# Numbers of pair products held at once, 2 MB in float32: what fits is kept from the Gram matrix to the update.
_PAIR_NUMBERS = 1 << 19
_SLICE_NUMBERS = 1 << 18  # likewise of slices
# Numbers of rows held at once: 4 MB in float32, where a CPU's caches serve best; a GPU wants fewer and larger products.
_ROW_NUMBERS = {"cpu": 1 << 20}
_ROW_NUMBERS_OF_DEVICES = 1 << 24
_TILE_COLUMNS = 256  # few rows of many columns are a slower product than as many numbers nearer to a square
_PERIOD = 512  # numbers after which rows of H compete for the same lines of a cache ...
_APART = 64  # ... unless their distance differs by so many from a multiple of it: products of H H^T are twice as fast
_FEW = 3  # observations per sample up to which sums over them are faster than products of matrices so small


@dataclass(frozen=True, kw_only=True)
class Diagonal(Layerwise):
    """P as n variances, in the weights' dtype but never below float32.

    Attributes:
        kind: the family's name.
        rule: which diagonal approximates the posterior; see the module.
        samples: draws from which the covariance's update is estimated; 0 computes it.
    """

    kind: Literal["diagonal"] = "diagonal"
    rule: Literal["ekf", "vdekf"] = "ekf"
    samples: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"samples is {self.samples}; take 1 draw or more, or 0 for the exact update")

    @property
    def signs(self) -> int:
        """One for each of the samples."""
        return self.samples

    def grain(self, layer: Layer) -> int:
        """One row: variances do not need one another, and whole rows keep factors."""
        return 1

    def cost(self, layer: Layer) -> int:
        """One number per weight."""
        return layer.size

    def init_layer(self, part: Part, p0: float, like: Tensor) -> LayerState:
        """(size,) prior variances p0."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {_VARIANCE: torch.full((part.size,), p0, dtype=dtype, device=like.device)}

    def predict_layer(self, P: LayerState, scale: float, q: float) -> LayerState:
        """(size,) scale * P + q."""
        return {_VARIANCE: P[_VARIANCE] * scale + q}

    def gram_layer(self, P: LayerState, H: Factors | Rows) -> tuple[Tensor, Any]:
        """(M, M) H P H^T."""
        variance, work = P[_VARIANCE], self.work_layer(P, H)
        if isinstance(work, Slices):
            return work.gram(variance), work
        if isinstance(work, _Pairs):
            return _gram_of_pairs(variance, work), work
        gram: Tensor | None = None
        for (tile,), rows in _tiles(H, variance):
            root = tile.sqrt().reshape(-1)
            rows = rows.mul_(root) if _formed(H) else rows * root
            # a list of the shares would lie scattered between the tiles, whose memory could then not be used again
            gram = rows @ rows.mT if gram is None else torch.addmm(gram, rows, rows.mT)
        assert gram is not None
        return gram, None

    def work_layer(self, P: LayerState, H: Factors | Rows) -> Any:
        """The factors by rows of the weight or by pairs of samples, where those pay; None is by runs of rows."""
        if isinstance(H, Factors) and slices_pay(H):
            return Slices.of(H, P[_VARIANCE].dtype)
        if isinstance(H, Factors) and pairs_pay(H):
            return _Pairs(H, P[_VARIANCE].dtype)
        return None

    def gain_layer(self, P: LayerState, H: Factors | Rows, work: Any, weights: Tensor) -> Tensor:
        """(size,) P H^T w."""
        return P[_VARIANCE] * H.combine(weights)

    def update_layer(self, P: LayerState, H: Factors | Rows, work: Any, innovation: Innovation) -> LayerState:
        """(size,) posterior variances, kept positive against rounding in ``ekf``."""
        return self._conditioned(P, H, work, innovation)[1]

    def condition_layer(
        self, P: LayerState, H: Factors | Rows, work: Any, innovation: Innovation
    ) -> tuple[Tensor, LayerState]:
        """Both from the same rows, where rows are formed."""
        step, posterior = self._conditioned(P, H, work, innovation)
        return self.gain_layer(P, H, work, innovation.weights) if step is None else step, posterior

    def _conditioned(
        self, P: LayerState, H: Factors | Rows, work: Any, innovation: Innovation
    ) -> tuple[Tensor | None, LayerState]:
        """P H^T w where rows are formed, and the posterior."""
        variance = P[_VARIANCE]
        information = self._without_rows(H, work, innovation, variance)
        if information is not None:
            return None, {_VARIANCE: self._posterior(variance, information.to(variance.dtype))}
        posterior, step = torch.empty_like(variance), torch.empty_like(variance)
        left, w = self._left(innovation, variance), innovation.weights.to(variance.dtype)
        both = None if left is None else torch.cat([left, w.unsqueeze(0)])  # so that rows are read once
        scratch = _Scratch()
        for (tile, new, moved), rows in _tiles(H, variance, posterior, step):
            if both is None:
                moved.copy_((w @ rows).view(tile.shape))
                energies = rows.square_() if _formed(H) else rows.square()
            else:
                seen = torch.mm(both, rows, out=scratch.like(rows.dtype, rows, len(both), rows.shape[1]))
                moved.copy_(seen[-1].view(tile.shape))
                energies = seen[:-1].mul_(seen[:-1])
            new.copy_(energies.sum(0).view(tile.shape))
        return step.mul_(variance), {_VARIANCE: self._posterior(variance, posterior)}

    def _without_rows(self, H: Factors | Rows, work: Any, innovation: Innovation, like: Tensor) -> Tensor | None:
        """(size,) what the observations tell about each weight, where factors give it at less cost."""
        if self.samples and isinstance(H, Factors) and (H.single or self.samples < H.g.shape[1]):
            left = self._left(innovation, like)
            assert left is not None
            return torch.stack([H.combine(row).to(like.dtype).square() for row in left]).sum(0)
        if self.samples or not isinstance(H, Factors):
            return None
        if self.rule == "vdekf":
            return column_energies(H) if H.single else None
        if isinstance(work, Slices):
            return work.information(innovation.inverse.to(like.dtype))
        if isinstance(work, _Pairs):
            return _information_of_pairs(work, innovation.inverse.to(like.dtype))
        return None

    def _left(self, innovation: Innovation, like: Tensor) -> Tensor | None:
        """(rows, M) matrix F with diag(H^T F^T F H) the information, or its estimate; None is I."""
        if self.samples:
            z = innovation.signs(self.samples) if self.rule == "vdekf" else innovation.probes(self.samples)
            return (z / self.samples**0.5).to(like)
        return None if self.rule == "vdekf" else innovation.inverse_root.to(like)

    def _posterior(self, variance: Tensor, information: Tensor) -> Tensor:
        """The variances after this much information, which is overwritten."""
        if self.rule == "vdekf" or self.samples:
            return 1.0 / (1.0 / variance + information)
        # Exact arithmetic keeps the posterior above 0; in float32 a weight seen by many confident
        # observations can round to zero and would never move again.
        lost = information.mul_(variance).clamp_max_(1.0 - torch.finfo(variance.dtype).eps)
        return torch.addcmul(variance, lost, variance, value=-1.0)

    def sample_layer(self, P: LayerState, draws: int, generator: Generator) -> Tensor:
        """(draws, size) z sqrt(P)."""
        variance = P[_VARIANCE]
        z = torch.randn(draws, len(variance), dtype=variance.dtype, generator=generator).to(variance.device)
        return z * variance.sqrt()

    def diagonal_layer(self, P: LayerState) -> Tensor:
        """(size,) P itself."""
        return P[_VARIANCE]

    def log_det_layer(self, P: LayerState) -> Tensor:
        """Sum of log variances."""
        return P[_VARIANCE].log().sum()


def column_energies(H: Factors | Rows) -> Tensor:
    """diag(H^T H).

    Args:
        H: a layer's Jacobian.

    Returns:
        (size,) sums of squares of the columns.
    """
    if isinstance(H, Factors) and H.single:
        g, x = H.g[:, :, 0].square().sum(1), H.x[:, 0].square()
        return (g.mT @ x).reshape(-1)
    return H.rows().square().sum(0)


def _tiles(H: Factors | Rows, *flat: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Views of flat tensors (size,) as tiles of the weight, and H (M, numbers) of each tile, in their dtype.

    The rows of one tile may reuse the memory of the previous tile's rows.
    """
    i = H.x.shape[-1] if isinstance(H, Factors) else 1
    wide = [tensor.view(-1, i) for tensor in flat]
    like, columns = wide[0], min(i, _TILE_COLUMNS)
    budget = _ROW_NUMBERS.get(like.device.type, _ROW_NUMBERS_OF_DEVICES)
    run = _run(budget // max(1, H.count * columns), columns)
    scratch = _Scratch()
    for start in range(0, len(like), run):
        for left in range(0, i, columns):
            stop, width = min(start + run, len(like)), slice(left, min(left + columns, i))
            piece = H.part(start, stop)
            if isinstance(piece, Factors):
                piece = Factors(piece.g, piece.x[..., width])
                rows = piece.rows(scratch.like(piece.row_dtype, piece.g, H.count, (stop - start) * (width.stop - left)))
            else:
                rows = piece.rows()
            yield [tensor[start:stop, width] for tensor in wide], rows.to(like.dtype)


class _Scratch:
    """Memory that products are written to in turn: allocating it anew for each takes longer than filling it."""

    def __init__(self) -> None:
        self._numbers: Tensor | None = None

    def like(self, dtype: "torch.dtype", where: Tensor, rows: int, columns: int) -> Tensor | None:
        """(rows, columns) on a tensor's device, always of one dtype; None where products cannot be directed."""
        if not eager():
            return None
        if self._numbers is None or self._numbers.numel() < rows * columns:
            self._numbers = where.new_empty(rows * columns, dtype=dtype)
        return self._numbers[: rows * columns].view(rows, columns)


def _formed(H: Factors | Rows) -> bool:
    """Whether rows of tiles are new tensors that may be written over; in a batch of fits, some may be shared by all."""
    return isinstance(H, Factors) and eager()


def _run(most: int, columns: int) -> int:
    """Rows of the weight in a tile, up to a limit, chosen so that the rows of H in it do not compete for a cache."""
    for run in range(most, max(most - 8, most // 2), -1):
        if _APART <= run * columns % _PERIOD <= _PERIOD - _APART:
            return run
    return max(1, most)


def pairs_pay(H: Factors) -> bool:
    """Whether pairs of factors are less work than rows.

    Both take M^2 n multiply-adds where k = 1; what differs is what is written and read again: (o + i)
    numbers for each pair of samples against about three passes over the n numbers of each row.

    Args:
        H: a layer's factors.

    Returns:
        The cheaper form; always rows where a row is not one outer product.
    """
    s, k, _, o = H.g.shape
    i = H.x.shape[-1]
    return H.single and (s + 1) / 2 * (k * o + i) <= 3 * k * o * i


def slices_pay(H: Factors) -> bool:
    """Whether a weight of few rows is less work row by row than by pairs of samples, and fits the budget.

    Args:
        H: a layer's factors.

    Returns:
        The form with fewer numbers.
    """
    s, k, _, o = H.g.shape
    i = H.x.shape[-1]
    numbers = s * o * (i + s * k**2)
    return H.single and numbers <= min(_SLICE_NUMBERS, s * (s + 1) // 2 * (k * o + i))


class _Pairs:
    """Products of the factors of all pairs (a, a + d) of samples, d = 0 ... s/2 around the circle.

    Together these are all pairs, each once; those with d = s/2 twice. A run of samples a is taken at a time,
    so that the products fit the budget; a single run is kept from the Gram matrix to the update.
    """

    def __init__(self, H: Factors, dtype: "torch.dtype") -> None:
        s, k, _, o = H.g.shape
        self.s, self.k, self.reach = s, k, s // 2 + 1
        self.g, self.x = H.g[:, :, 0].to(dtype), H.x[:, 0].to(dtype)
        self._windows = [_window(self.g, self.reach), _window(self.x, self.reach)]
        self.run = max(1, min(s, _PAIR_NUMBERS // (self.reach * (k * o + H.x.shape[-1]))))
        self.circle = _Circle.of(s, H.device)
        self._kept: tuple[Tensor, Tensor | None] | None = None

    def runs(self) -> list[slice]:
        """The samples a of each run."""
        return [slice(start, min(start + self.run, self.s)) for start in range(0, self.s, self.run)]

    def products(self, a: slice) -> tuple[Tensor, Tensor | None]:
        """x_a * x_b (pairs, i) of a run, and g_a * g_b (pairs, o) where k = 1."""
        if self._kept is not None:
            return self._kept
        x = (self.x[a].unsqueeze(1) * self._windows[1][a]).flatten(0, 1)
        g = (self.g[a] * self._windows[0][a, :, 0]).flatten(0, 1) if self.k == 1 else None
        if self.run == self.s:
            self._kept = x, g
        return x, g

    def against(self, a: slice, spread: Tensor) -> Tensor:
        """(pairs, k, k) sums over o of g_a * g_b * spread, for spread (pairs, o) and each pair of observations."""
        spread, g, other = spread.unflatten(0, (-1, self.reach)), self.g[a].unsqueeze(1), self._windows[0][a]
        if self.k > _FEW:
            return ((g * spread.unsqueeze(2)) @ other.mT).flatten(0, 1)
        rows = [spread * g[:, :, j] for j in range(self.k)]
        return torch.stack([(row.unsqueeze(2) * other).sum(3) for row in rows], 2).flatten(0, 1)

    def mixed(self, a: slice, weights: Tensor) -> Tensor:
        """(pairs, o) sums over all pairs of observations of weights (pairs, k, k) times g_a * g_b."""
        weights, g, other = weights.unflatten(0, (-1, self.reach)), self.g[a].unsqueeze(1), self._windows[0][a]
        if self.k > _FEW:
            return ((weights @ other) * g).sum(2).flatten(0, 1)
        columns = [(weights[..., j].unsqueeze(3) * g).sum(2) * other[:, :, j] for j in range(self.k)]
        return torch.stack(columns).sum(0).flatten(0, 1)


class _Circle(NamedTuple):
    """Which samples the pairs (a, a + d) around a circle of s consist of, and where a given pair is among them."""

    a: Tensor  # (s, reach)
    b: Tensor  # (s, reach)
    of_pair: Tensor  # (s, s) number of the pair (a, b) or (b, a), whichever there is
    turned: Tensor  # (s, s) whether it is (b, a)

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, s: int, device: "torch.device") -> "_Circle":
        """On a device; not to be written to."""
        reach, sample = s // 2 + 1, torch.arange(s, device=device)
        steps = (sample - sample.unsqueeze(1)) % s
        turned = steps >= reach
        first = torch.where(turned, sample, sample.unsqueeze(1))
        b = (sample.unsqueeze(1) + sample[:reach]) % s
        return cls(
            sample.unsqueeze(1).expand(s, reach), b, first * reach + torch.where(turned, s - steps, steps), turned
        )


def _window(values: Tensor, reach: int) -> Tensor:
    """(s, reach, ...) views of values (s, ...): for each sample, itself and the samples after it around the circle."""
    return torch.cat([values, values[: reach - 1]]).unfold(0, reach, 1).movedim(-1, 1)


def _gram_of_pairs(variance: Tensor, pairs: _Pairs) -> Tensor:
    """H P H^T (M, M)."""
    s, k, o = pairs.s, pairs.k, pairs.g.shape[2]
    P = variance.view(o, -1)
    shares = []
    for a in pairs.runs():
        x, g = pairs.products(a)
        if g is None:
            shares.append(pairs.against(a, x @ P.mT))
        elif o < P.shape[1]:  # the longer side is summed in the product
            shares.append((x @ P.mT).mul_(g).sum(1))
        else:
            shares.append((g @ P).mul_(x).sum(1))
    share = shares[0] if len(shares) == 1 else torch.cat(shares)
    if k == 1:
        return share[pairs.circle.of_pair]
    share = share.view(-1, k, k)
    gram = torch.where(
        pairs.circle.turned[..., None, None], share.mT[pairs.circle.of_pair], share[pairs.circle.of_pair]
    )
    return gram.transpose(1, 2).reshape(s * k, s * k)


def _information_of_pairs(pairs: _Pairs, inverse: Tensor) -> Tensor:
    """diag(H^T S^-1 H) (size,)."""
    s, k = pairs.s, pairs.k
    weights = inverse.view(s, k, s, k).transpose(1, 2)[pairs.circle.a, pairs.circle.b]
    weights[:, 1 : (s + 1) // 2] *= 2.0  # such a pair stands for (a, b) and (b, a)
    total: Tensor | None = None
    for a in pairs.runs():
        x, g = pairs.products(a)
        share = weights[a].flatten(0, 1)
        if g is None:
            left, right = pairs.mixed(a, share), x
        elif g.shape[1] < x.shape[1]:  # the shorter side is weighed
            left, right = g * share[:, 0], x
        else:
            left, right = g, x * share[:, 0]
        total = left.mT @ right if total is None else torch.addmm(total, left.mT, right)
    assert total is not None
    return total.reshape(-1)
