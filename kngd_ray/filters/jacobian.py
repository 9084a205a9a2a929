r"""The observation Jacobian H, layer by layer, as rows or as the factors of rows.

A weight W (o, i) of a linear layer has rows of a special form: with x_t the layer's input at token t
and g_t the derivative of the observed scalar with respect to its output there ::

    d h / d W = sum_t g_t x_t^T

So H is kept as (g, x) where it has that form, m T (o + i) numbers instead of m o i, and as plain rows where it does
not. The k observations of one sample share its x.

All observations of a batch are ordered by sample, the k of a sample together: M = s k rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kngd_ray._deferred import Tensor, torch


@dataclass(frozen=True)
class Layer:
    """A named parameter as the filter sees it: a matrix of o rows and i columns.

    Attributes:
        name: the parameter's name.
        o: rows; all entries of a parameter whose Jacobian has no factors.
        i: columns; 1 for a parameter whose Jacobian has no factors.
        factored: whether its Jacobian comes as :class:`Factors`.
    """

    name: str
    o: int
    i: int
    factored: bool

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.o * self.i


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a layer, the part of it that one rank owns.

    Attributes:
        layer: the whole layer.
        start: first row.
        stop: one past the last row.
    """

    layer: Layer
    start: int
    stop: int

    @property
    def o(self) -> int:
        """Rows of the part."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.o * self.layer.i

    @property
    def flat(self) -> slice:
        """Where the part lies in the flattened layer."""
        return slice(self.start * self.layer.i, self.stop * self.layer.i)

    @property
    def whole(self) -> bool:
        """Whether it is all of the layer."""
        return self.o == self.layer.o


@dataclass(frozen=True)
class Factors:
    """Rows ``sum_t g_t x_t^T`` that are never formed.

    Attributes:
        g: (s, k, T, o) derivative of each observation with respect to the layer's output at each token.
        x: (s, T, i) input of the layer, or (T, i) where all samples share it.
    """

    g: Tensor
    x: Tensor

    @property
    def count(self) -> int:
        """M, number of rows."""
        return self.g.shape[0] * self.g.shape[1]

    @property
    def own_x(self) -> bool:
        """Whether each sample has an x of its own."""
        return self.x.dim() == 3

    @property
    def single(self) -> bool:
        """Whether each sample has one token of its own, so that each row is one outer product."""
        return self.g.shape[2] == 1 and self.own_x

    def within(self, reach: float) -> bool:
        """Whether the factors have fewer numbers than `reach` times the rows."""
        _, k, T, o = self.g.shape
        i = self.x.shape[-1]
        return T * (k * o + (i if self.own_x else 0)) < reach * k * o * i

    def rows(self, out: Tensor | None = None) -> Tensor:
        """(M, o i) the rows themselves, written over M o i numbers of their dtype if these are given."""
        s, k, T, o = self.g.shape
        g, x = self._alike
        i = x.shape[-1]
        if self.own_x:  # one product for each sample; for k = 1 nothing is copied
            to = None if out is None else out.view(s, k * o, i)
            return torch.bmm(g.transpose(1, 2).reshape(s, T, k * o).mT, x, out=to).view(s * k, o * i)
        to = None if out is None else out.view(s * k * o, i)
        return torch.mm(g.mT.reshape(s * k * o, T), x, out=to).view(s * k, o * i)

    def part(self, start: int, stop: int) -> "Factors":
        """The rows start to stop of the weight."""
        return Factors(self.g[..., start:stop], self.x)

    def take(self, start: int, stop: int, k: int) -> "Factors":
        """The rows of the samples start to stop."""
        return Factors(self.g[start:stop], self.x[start:stop] if self.own_x else self.x)

    def scaled(self, d: Tensor) -> "Factors":
        """Each row of H times its entry of d (M,)."""
        return Factors(self.g * d.to(self.g.dtype).view(*self.g.shape[:2], 1, 1), self.x)

    def combine(self, w: Tensor) -> Tensor:
        """H^T w as (o i,), for w (M,)."""
        s, k, T, o = self.g.shape
        g, x = self._alike
        w = w.to(g.dtype)
        if k == 1:
            gw = g.reshape(s, T * o) * w.unsqueeze(1)
        else:
            gw = torch.bmm(w.view(s, 1, k), g.reshape(s, k, T * o)).view(s, T * o)
        if self.own_x:
            return (gw.view(s * T, o).mT @ x.reshape(s * T, x.shape[-1])).reshape(-1)
        return (gw.view(s, T, o).sum(0).mT @ x).reshape(-1)

    def times(self, v: Tensor) -> Tensor:
        """H v as (M,), for v (o i,)."""
        s, k, _, o = self.g.shape
        g, x = self._alike
        out = x @ v.view(o, -1).mT.to(x.dtype)
        return (g * (out.unsqueeze(1) if self.own_x else out)).sum((2, 3)).reshape(s * k)

    @property
    def _alike(self) -> tuple[Tensor, Tensor]:
        """G and x of one dtype: under autocast a layer's input may be wider than what comes back to its output."""
        return self.g.to(self.row_dtype), self.x.to(self.row_dtype)

    @property
    def row_dtype(self) -> "torch.dtype":
        """Of the rows."""
        return torch.promote_types(self.g.dtype, self.x.dtype)

    @property
    def dtype(self) -> "torch.dtype":
        """Of the numbers."""
        return self.g.dtype

    @property
    def device(self) -> "torch.device":
        """Of the numbers."""
        return self.g.device


@dataclass(frozen=True)
class Rows:
    """Rows of H as they are.

    Attributes:
        values: (M, size) derivatives.
    """

    values: Tensor

    @property
    def count(self) -> int:
        """M, number of rows."""
        return len(self.values)

    def rows(self) -> Tensor:
        """(M, size) the rows."""
        return self.values

    def part(self, start: int, stop: int) -> "Rows":
        """The columns start to stop."""
        return Rows(self.values[:, start:stop])

    def take(self, start: int, stop: int, k: int) -> "Rows":
        """The rows of the samples start to stop, k of each."""
        return Rows(self.values[start * k : stop * k])

    def scaled(self, d: Tensor) -> "Rows":
        """Each row times its entry of d (M,)."""
        return Rows(self.values * d.to(self.values.dtype).unsqueeze(1))

    def combine(self, w: Tensor) -> Tensor:
        """H^T w as (size,), for w (M,)."""
        return self.values.mT @ w.to(self.values.dtype)

    def times(self, v: Tensor) -> Tensor:
        """H v as (M,), for v (size,)."""
        return self.values @ v.to(self.values.dtype)

    @property
    def dtype(self) -> "torch.dtype":
        """Of the numbers."""
        return self.values.dtype

    @property
    def device(self) -> "torch.device":
        """Of the numbers."""
        return self.values.device


# H of a batch: one entry for each layer, or for each part of a layer that a rank owns.
Jacobian = Mapping[str, Factors | Rows]


def scaled(H: Jacobian, d: Tensor) -> dict[str, Factors | Rows]:
    """Weigh observations.

    Args:
        H: the Jacobian.
        d: (M,) weight of each row.

    Returns:
        diag(d) H.
    """
    return {name: piece.scaled(d) for name, piece in H.items()}
