r"""One Kronecker product B (x) A per weight matrix: covariance between rows times covariance between columns.

For a weight W (o, i) of a linear layer ``cov(W_ab, W_cd) = B_ac A_bd``, o^2 + i^2 numbers for o i weights that
are all correlated. No filter in the literature does this; it is the covariance counterpart of K-FAC, whose
factors B and A are here propagated by Bayes' rule instead of averaged. Layers without factors (biases,
scales) have one variance per weight, as in :mod:`~kngd_ray.filters.diagonal`.

With one token per sample h_m = g_m (x) x_m; G and X are the g_m and x_m as rows, * is elementwise ::

    P h_m = B g_m (x) A x_m      K = G B G^T      N = X A X^T
    H P H^T = K * N              P H^T w = (G B)^T diag(w) (X A)

so the mean step is the only array of o i numbers that is formed. The posterior Sigma = P - P H^T S^-1 H P is not a
Kronecker product. The nearest one in KL(Sigma || B' (x) A') satisfies (set its derivatives to zero) ::

    B' = 1/i Tr_A[Sigma (I (x) A'^-1)]            A' = 1/o Tr_B[Sigma (B'^-1 (x) I)]

Each half is the exact minimiser given the other factor. One sweep starts from the prior's A. The first trace of P is
i B, and of P h_m h_n^T P it is (x_m^T A x_n) B g_m g_n^T B, hence ::

    E  = (S^-1 * N) / i
    B' = B - (G B)^T E (G B)

The second trace of P is tr(B B'^-1) A, and of P h_m h_n^T P it is K'_mn A x_m x_n^T A with K' = G B B'^-1 B G^T. By
Woodbury B B'^-1 B = B + B G^T (E^-1 - K)^-1 G B, so that ::

    K' = K + K (E^-1 - K)^-1 K = (I - K E)^-1 K        tr(B B'^-1) = o + tr(E K')
    A' = [(o + tr(E K')) A - (X A)^T (S^-1 * K') (X A)] / o

Sigma, and with it B' and A', is positive definite. The second half makes tr(A^-1 A') = i: A keeps its scale, B carries
the scale of P, and the two need no balancing to stay in the range of floats.

T tokens, h_m = sum_t g_mt (x) x_mt, are T terms for one term above: K and N are then over pairs of tokens, S^-1
is repeated over the tokens, and H P H^T is the sum of K * N over the tokens of a pair. The k observations of a
sample, or all samples, may share x: X A and N are computed once and repeated. This takes (M T)^2 numbers. Where
M matrices h_m of o i numbers are fewer, they are formed: with Y_a = sum_m (L^-1)_am B h_m, S = L L^T ::

    B' = B - 1/i sum_a Y_a A Y_a^T        A' = [tr(B B'^-1) A - sum_a (Y_a A)^T B'^-1 (Y_a A)] / o

``tokens=reduced`` puts one token in the place of a sample's T, g = sum_t g_t and x = mean_t x_t, in the update of B
and A and in H P H^T between different samples. What the mean step and each sample's own variance are made of stays
exact: P H^T w = B (H^T w) A, and the blocks of H P H^T on its diagonal, from T^2 pairs of each sample instead of
(s T)^2 of all. Both matter. Tokens that are alike are one token, but the sum of tokens that differ may keep as little
as 1 / T of what the rows hold. A mean step of full rows against an S that knows of so little would overshoot by as
much. What is given up is what single tokens hold of the covariance between samples and of what the factors learn. Where
the single token is larger than the sum that it stands for, S keeps the larger variance: it always exceeds the H P H^T
that B and A are updated by, which keeps them definite. Where T (o + i) is over four times o i, matrices h_m are less
work than a forward pass, and the layer is left exact.

Prior: B = p0 I and A = I, or A = (W + c I)^-1 up to its scale, W the covariance of the layer's inputs within the
classes of the shots and c their mean variance times `shrinkage`: Delta x of a linear classifier is then equally certain
a priori in directions in which pictures of one class differ and in others. It is the prior under which a Gaussian
classifier with a shared covariance is an ordinary point. Around the offset that all images share it is a prior over
functions (:mod:`~kngd_ray.filters.informed`).

Predict: scale B (x) A + q I is no Kronecker product either; the one with the same two partial traces is ::

    a = tr(A) / i      B' = scale B + (q / a) I      A' = (scale tr(B) A + q o I) / (scale tr(B) + q o / a)

A share of the prior P_0 = B_0 (x) A_0 is added likewise, in the coordinates in which P_0 is the identity, so that the
result does not depend on the features' coordinates ::

    a = tr(A_0^-1 A) / i      b = tr(B_0^-1 B)
    B' = B + (share / a) B_0      A' = (b A + share o A_0) / (b + share o / a)
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kngd_ray._deferred import Generator, Tensor, torch
from kngd_ray.filters._innovation import Innovation
from kngd_ray.filters._layerwise import LayerState, Layerwise
from kngd_ray.filters.dense import ROUNDING, root, rounded_up, symmetric
from kngd_ray.filters.diagonal import Diagonal
from kngd_ray.filters.functional_mode import cholesky, eager
from kngd_ray.filters.informed import measured_columns, measured_without, within_class_covariance
from kngd_ray.filters.jacobian import Factors, Layer, Part, Rows
from kngd_ray.filters.left_out import PriorWithout

_PRIOR = {"B": "B0", "A": "A0"}  # names of P_0 in a layer's state
_REACH = 4.0  # times the numbers of rows: beyond, factors are not reduced
_PLAIN = Diagonal()  # of layers without factors


class _Tokens(NamedTuple):
    """G B (M T, o), X A (tokens, i), K (M T, M T), and N, which broadcasts over (s, k, T, s, k, T)."""

    GB: Tensor
    XA: Tensor
    K: Tensor
    N: Tensor


@dataclass(frozen=True, kw_only=True)
class Kronecker(Layerwise):
    """P as B (o, o) and A (i, i) for each weight matrix, in the weights' dtype but never below float32.

    Attributes:
        kind: the family's name.
        tokens: whether all pairs of tokens are counted, or one token stands for those of a sample; see the module.
        columns: the prior's A: ``identity``; ``within_class``, the inverse of how the inputs that the shots give to a
            layer vary within classes; or ``function``, that metric around the offset that all images share, see
            :mod:`~kngd_ray.filters.informed`.
        shrinkage: of the metric towards the identity, in mean variances within classes, or for ``function`` in typical
            ones; a large value gives the identity.
        offset: for ``function``, the variance of the shots, in units of the typical one, along which half of their mean
            counts as particular to them; 0 takes all of their mean for the common offset.
        bias: for ``function``, the prior variance of a logit at the common offset, in units of the one around the
            shots.
    """

    kind: Literal["kronecker"] = "kronecker"
    tokens: Literal["exact", "reduced"] = "exact"
    columns: Literal["identity", "within_class", "function"] = "identity"
    shrinkage: float = 5.0
    offset: float = 0.01
    bias: float = 0.1

    def __post_init__(self) -> None:
        if not self.shrinkage > 0:
            raise ValueError(f"shrinkage is {self.shrinkage}; it must be above 0")
        for name, value in (("offset", self.offset), ("bias", self.bias)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")

    @property
    def reach(self) -> float:
        """Reduced tokens are worth some bytes between ranks; rows could not be reduced."""
        return 1.0 if self.tokens == "exact" else _REACH

    def grain(self, layer: Layer) -> int:
        """All rows of a weight matrix, which B couples; one of anything else."""
        return layer.o if layer.factored else _PLAIN.grain(layer)

    def cost(self, layer: Layer) -> int:
        """The numbers of B and A."""
        return layer.o**2 + layer.i**2 if layer.factored else _PLAIN.cost(layer)

    def init_layer(self, part: Part, p0: float, like: Tensor) -> LayerState:
        """B = p0 I, A = I."""
        if not part.layer.factored:
            return _PLAIN.init_layer(part, p0, like)
        dtype = torch.promote_types(like.dtype, torch.float32)
        B, A = (torch.eye(n, dtype=dtype, device=like.device) for n in (part.layer.o, part.layer.i))
        return {"B": p0 * B, "A": A}

    def informed_layer(self, P: LayerState, x: Tensor, labels: Tensor) -> LayerState:
        """A prior whose A knows how inputs vary within classes.

        Args:
            P: the prior of a factored layer.
            x: (m, i) inputs of the layer.
            labels: (m,) classes.

        Returns:
            The prior, its tr(A) = i as before; as it is where no class has two inputs that differ.
        """
        if self.columns == "identity" or not len(x):  # a fold may hold out all there is
            return P
        return {**P, "A": self.columns_of(x.double(), labels).to(P["A"]).contiguous()}

    def columns_of(self, x: Tensor, labels: Tensor) -> Tensor:
        """The prior's A, measured on inputs of a layer.

        Args:
            x: (m, i) inputs of the layer, m at least 1.
            labels: (m,) classes.

        Returns:
            (i, i) with tr(A) = i, in the inputs' precision; the identity where no class has two inputs that differ.
        """
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        if self.columns == "identity":
            return eye
        if self.columns == "function":
            return measured_columns(x, labels, shrinkage=self.shrinkage, reach=self.offset, bias=self.bias)
        W = within_class_covariance(x, labels)
        mean = W.diagonal().mean()
        if not mean > torch.finfo(torch.float32).eps * x.square().mean():
            return eye
        W.diagonal().add_(self.shrinkage * mean)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(W))
        return inverse * (len(W) / inverse.diagonal().sum())

    def prior_without(self, A: Tensor, x: Tensor, labels: Tensor, views: int = 1) -> PriorWithout | None:
        """How the prior's A would change without each of the pictures that it was measured on.

        Args:
            A: (i, i) a multiple of :meth:`columns_of` these.
            x: (m, i) inputs of the layer.
            labels: (m,) classes.
            views: samples of each picture, one after another.

        Returns:
            The changes; None where they are not known in closed form.
        """
        if self.columns == "identity":
            return PriorWithout.unchanged(len(x) // views, x)
        if self.columns == "within_class":
            return None
        return measured_without(
            A.double(), x.double(), labels, shrinkage=self.shrinkage, reach=self.offset, views=views
        )

    def predict_layer(self, P: LayerState, scale: float, q: float) -> LayerState:
        """The product with the partial traces of scale * P + q I."""
        if "B" not in P:
            return _PLAIN.predict_layer(P, scale, q)
        B, A = scale * P["B"], P["A"]
        if not eager() or q > 0:
            trace, mean = B.diagonal().sum(), A.diagonal().mean()
            total = trace + q * len(B) / mean
            A = A * (trace / total)
            A.diagonal().add_(q * len(B) / total)
            B.diagonal().add_(q / mean)
        return {**P, "B": B, "A": A}

    def with_prior(self, P: LayerState) -> LayerState:
        """A layer's prior covariance with a copy of itself that stays, for :meth:`drifted_layer`.

        Args:
            P: B (o, o) and A (i, i).

        Returns:
            The same with B0 and A0.
        """
        return {**P, **{prior: P[key].clone() for key, prior in _PRIOR.items()}}

    def keeps_prior(self, P: LayerState) -> bool:
        """Whether the prior is kept beside a layer's covariance."""
        return all(prior in P for prior in _PRIOR.values())

    def drifted_layer(self, P: LayerState, share: float) -> LayerState:
        """A covariance that has gained a share of its prior.

        Args:
            P: with the prior beside it.
            share: of the prior.

        Returns:
            The product with the partial traces of P + share P_0, where P_0 is the identity.
        """
        B, A, B0, A0 = (P[key].double() for key in ("B", "A", "B0", "A0"))
        o, i = len(B), len(A)
        a, b = _solved_trace(A0, A) / i, _solved_trace(B0, B)
        total = b + share * o / a
        drifted = {"B": B + share / a * B0, "A": (b * A + share * o * A0) / total}
        # laid out as a checkpoint is read back: products then round alike
        return {**P, **{key: symmetric(value).to(P[key]).contiguous() for key, value in drifted.items()}}

    def gram_layer(self, P: LayerState, H: Factors | Rows) -> tuple[Tensor, Any]:
        """(M, M) sums of K * N over tokens, and the factors of it; or the matrices B h_m (M, o, i)."""
        if "B" not in P:
            return _PLAIN.gram_layer(P, H)
        seen = self._seen(H, P["B"].dtype)
        share, work = _gram(P["B"], P["A"], seen)
        if seen is not H:
            assert isinstance(H, Factors)
            k = H.g.shape[1]
            blocks = share.view(-1, k, len(share) // k, k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            lost = _positive(_own_blocks(P["B"], P["A"], H) - blocks)
            share = share + torch.block_diag(*lost) if k > 1 else share + lost.view(-1).diag()
        return share, work

    def work_layer(self, P: LayerState, H: Factors | Rows) -> Any:
        """The factors of the sums, or the matrices B h_m."""
        if "B" not in P:
            return _PLAIN.work_layer(P, H)
        return _gram(P["B"], P["A"], self._seen(H, P["B"].dtype))[1]

    def _seen(self, H: Factors | Rows, dtype: "torch.dtype") -> Factors | Rows:
        """H, or one token for each sample in its place."""
        if self.tokens == "exact" or not isinstance(H, Factors) or H.g.shape[2] == 1 or not H.within(_REACH):
            return H
        return Factors(H.g.to(dtype).sum(2, keepdim=True), H.x.to(dtype).mean(-2, keepdim=True))

    def gain_layer(self, P: LayerState, H: Factors | Rows, work: Any, weights: Tensor) -> Tensor:
        """(size,) P H^T w."""
        if "B" not in P:
            return _PLAIN.gain_layer(P, H, work, weights)
        if self._seen(H, P["B"].dtype) is not H:
            B, A = P["B"], P["A"]
            return (B @ H.combine(weights).to(B.dtype).view(len(B), len(A)) @ A).reshape(-1)
        if isinstance(work, _Tokens):
            assert isinstance(H, Factors)
            return Factors(work.GB.reshape(H.g.shape), work.XA.reshape(H.x.shape)).combine(weights)
        return (torch.tensordot(weights.to(work.dtype), work, 1) @ P["A"]).reshape(-1)

    def update_layer(self, P: LayerState, H: Factors | Rows, work: Any, innovation: Innovation) -> LayerState:
        """One sweep from the prior's factors to the nearest product."""
        if "B" not in P:
            return _PLAIN.update_layer(P, H, work, innovation)
        if isinstance(work, _Tokens):
            seen = self._seen(H, P["B"].dtype)
            assert isinstance(seen, Factors)
            return _sweep_of_tokens(P["B"], P["A"], seen, work, innovation.inverse)
        return _sweep_of_matrices(P["B"], P["A"], work, innovation.cholesky)

    def sample_layer(self, P: LayerState, draws: int, generator: Generator) -> Tensor:
        """(draws, size) L_B Z L_A^T."""
        if "B" not in P:
            return _PLAIN.sample_layer(P, draws, generator)
        B, A = P["B"], P["A"]
        Z = torch.randn(draws, len(B), len(A), dtype=B.dtype, generator=generator).to(B.device)
        return (root(B) @ Z @ root(A).mT).flatten(1)

    def diagonal_layer(self, P: LayerState) -> Tensor:
        """(size,) products of the variances of rows and columns."""
        if "B" not in P:
            return _PLAIN.diagonal_layer(P)
        return torch.outer(P["B"].diagonal(), P["A"].diagonal()).reshape(-1)

    def log_det_layer(self, P: LayerState) -> Tensor:
        """I log |B| + o log |A|."""
        if "B" not in P:
            return _PLAIN.log_det_layer(P)
        B, A = P["B"], P["A"]
        return len(A) * torch.linalg.slogdet(B).logabsdet + len(B) * torch.linalg.slogdet(A).logabsdet


def _solved_trace(prior: Tensor, P: Tensor) -> Tensor:
    """The trace of P_0^-1 P, where P_0 is not 0; it may have been measured in single precision."""
    ridge = torch.finfo(torch.float32).eps * prior.diagonal().mean()
    definite = prior + ridge * torch.eye(len(prior), dtype=prior.dtype, device=prior.device)
    return torch.cholesky_solve(P, torch.linalg.cholesky(definite)).diagonal().sum()


def tokens_pay(H: Factors) -> bool:
    """Whether pairs of tokens are fewer numbers, and less work, than one matrix per observation.

    Args:
        H: a layer's factors.

    Returns:
        (M T)^2 <= M o i; always so for one token and fewer observations than weights.
    """
    T, o = H.g.shape[2:]
    return H.count * T**2 <= o * H.x.shape[-1]


def _gram(B: Tensor, A: Tensor, H: Factors | Rows) -> tuple[Tensor, Any]:
    """(M, M) H P H^T, and what it was made of."""
    if not isinstance(H, Factors) or not tokens_pay(H):
        h = H.rows().to(B.dtype)
        Bh = B @ h.view(H.count, len(B), len(A))
        return h @ (Bh @ A).flatten(1).mT, Bh
    s, k, T, o = H.g.shape
    G, X = H.g.to(B.dtype).reshape(s * k * T, o), H.x.to(B.dtype).reshape(-1, len(A))
    GB, XA = G @ B, X @ A
    K, N = GB @ G.mT, XA @ X.mT
    tokens = (s if H.own_x else 1, 1, T)
    N = N.reshape(tokens + tokens)
    pairs = K.reshape(s, k, T, s, k, T) * N
    share = pairs.sum((2, 5)) if T > 1 else pairs
    return share.reshape(s * k, s * k), _Tokens(GB, XA, K, N)


def _own_blocks(B: Tensor, A: Tensor, H: Factors) -> Tensor:
    """(s, k, k) blocks of H P H^T on its diagonal, by pairs of tokens or by matrices, whichever are fewer numbers."""
    s, k, T, o = H.g.shape
    if k * T**2 <= o * len(A):
        g, x = H.g.to(B.dtype).reshape(s, k * T, o), H.x.to(B.dtype)
        K, N = (g @ B) @ g.mT, (x @ A) @ x.mT
        N = N.view(-1, 1, T, 1, T)
        return (K.view(s, k, T, k, T) * N).sum((2, 4))
    h = H.rows().to(B.dtype).view(s * k, o, len(A))
    return h.view(s, k, -1) @ (B @ h @ A).view(s, k, -1).mT


def _positive(blocks: Tensor) -> Tensor:
    """The positive part of symmetric blocks (s, k, k)."""
    if blocks.shape[-1] == 1:
        return blocks.clamp_min(0)
    values, axes = torch.linalg.eigh((blocks + blocks.mT) / 2)
    return (axes * values.clamp_min(0).unsqueeze(-2)) @ axes.mT


def _sweep_of_tokens(B: Tensor, A: Tensor, H: Factors, work: _Tokens, inverse: Tensor) -> LayerState:
    s, k, T, _ = H.g.shape
    o, i, tokens = len(B), len(A), len(work.XA)
    # What is as small as S is computed in float64: K S^-1 loses the square of the signal-to-noise ratio.
    K, N = work.K.double(), work.N.double()
    inverse = inverse.view(s, k, 1, s, k, 1)
    iE = (inverse * N).expand(s, k, T, s, k, T).reshape(K.shape)
    L = root(iE)
    LK = L.mT @ K
    half = _root_of_rest(LK @ L, 1.0 / i, B.dtype)  # I - L^T K L / i has the eigenvalues of B^-1 B' other than 1
    W = torch.linalg.solve_triangular(half, LK, upper=False)
    K_new = torch.addmm(K, W.mT, W, alpha=1.0 / i)
    trace = o + (iE * K_new).sum() / i
    F = (inverse * K_new.view(s, k, T, s, k, T)).sum_to_size(N.shape).reshape(tokens, tokens)
    U, V = L.mT.to(B.dtype) @ work.GB, root(F).mT.to(A.dtype) @ work.XA
    B_new = torch.addmm(B, U.mT, U, alpha=-1.0 / i)
    grown = (trace / o).to(A.dtype)  # tr(B B'^-1) / o, at least 1
    A_new = torch.addmm(A, V.mT / grown, V, alpha=-1.0 / o)
    return {"B": rounded_up(symmetric(B_new), B), "A": rounded_up(symmetric(A_new, grown), A)}


def _sweep_of_matrices(B: Tensor, A: Tensor, Bh: Tensor, cholesky: Tensor) -> LayerState:
    o, i = len(B), len(A)
    Y = torch.linalg.solve_triangular(cholesky.to(B.dtype), Bh.flatten(1), upper=False).view_as(Bh)
    YA = (Y @ A).transpose(0, 1).reshape(o, -1)  # (o, M i): the sum over matrices and columns is one product
    B_new = torch.addmm(B, YA, Y.transpose(0, 1).reshape(o, -1).mT, alpha=-1.0 / i)
    B_new = rounded_up(symmetric(B_new), B)
    solved = torch.linalg.solve(B_new, torch.cat([B, YA], 1))
    trace = solved[:, :o].diagonal().sum()
    A_new = torch.addmm(A * (trace / o), YA.reshape(-1, i).mT, solved[:, o:].reshape(-1, i), alpha=-1.0 / o)
    return {"B": B_new, "A": rounded_up(symmetric(A_new), A)}


def _root_of_rest(Q: Tensor, scale: float, dtype: "torch.dtype") -> Tensor:
    """Cholesky factor of I - scale Q, Q from numbers of a dtype, whose rounding may have made it a little too large."""
    lost = ROUNDING * torch.finfo(dtype).eps
    J = Q * (scale * (lost - 1.0))
    J.diagonal().add_(1.0)
    half = cholesky(J)
    if half is not None:
        return half
    values, axes = torch.linalg.eigh(J)
    return torch.linalg.cholesky((axes * values.clamp_min(lost)) @ axes.mT)
