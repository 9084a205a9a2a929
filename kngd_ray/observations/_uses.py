"""What a parameter does in one call of a function, and its part of H from the derivative of the call's output.

A use turns g, the derivative of the observations with respect to the output of the call, into the Jacobian of
the parameter: as factors where the parameter is a matrix that multiplies tokens, as rows elsewhere. Nothing
of that is computed before it is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from kngd_ray.filters import Factors, Rows


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """A tensor that is made of one parameter and of nothing else.

    Attributes:
        name: the parameter's name.
        parameter: the parameter.
        value: the tensor.
        form: ``same`` has the parameter's entries in their order, ``transposed`` is the transpose of such a matrix.
        make: the tensor from the parameter.
    """

    name: str
    parameter: Tensor
    value: Tensor
    form: Literal["same", "transposed", "other"] = "same"
    make: Callable[[Tensor], Tensor] = _itself

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of the parameter's entries."""
        return self.form != "other" and self.value.dim() == 2

    def rows(self, values: Tensor) -> Rows:
        """Rows with respect to the parameter from those with respect to the tensor, (M, ...)."""
        values = values.detach()
        if self.form == "same":
            return Rows(values.reshape(len(values), self.parameter.numel()))
        if self.form == "transposed":
            return Rows(values.mT.reshape(len(values), self.parameter.numel()))
        if not len(values):
            return Rows(values.new_zeros(0, self.parameter.numel()))
        pull = vjp(self.make, self.parameter.detach())[1]
        (found,) = vmap(pull)(values.to(self.value.dtype))
        return Rows(found.reshape(len(values), self.parameter.numel()))


@dataclass(frozen=True)
class Call:
    """One call of a function with parameters among its arguments.

    Attributes:
        uses: what it does with each of them.
        tensors: its other tensors.
        like: shape, dtype and device of its output.
        edge: where the output is in the graph; None in a pass by ``torch.func``.
    """

    uses: Sequence["Use"]
    tensors: Sequence[Tensor]
    like: Tensor
    edge: Any


@dataclass(frozen=True)
class Layout:
    """Where the samples are in the tensors of a call.

    Attributes:
        out: the dimension of its output that samples lie in; None where all samples share the output.
        tensors: the same of its other tensors.
    """

    out: int | None
    tensors: Sequence[int | None]

    @classmethod
    def of(cls, one: Call, two: Call) -> "Layout | None":
        """From a call on one sample and on two; None where there is no such dimension."""
        if len(one.tensors) != len(two.tensors):
            return None
        pairs = zip((one.like, *one.tensors), (two.like, *two.tensors), strict=True)
        try:
            out, *tensors = [_dimension(a.shape, b.shape) for a, b in pairs]
        except ValueError:
            return None
        if out is None and any(dim is not None for dim in tensors):
            return None
        return cls(out, tensors)

    def by_sample(self, g: Tensor, m: int, k: int) -> Tensor:
        """Derivatives (m, k, ...) from what was pulled back: (k, ...), or (m k, ...) where samples share the output."""
        return g.unflatten(0, (m, k)) if self.out is None else g.movedim(self.out + 1, 0)


def _dimension(one: Sequence[int], two: Sequence[int]) -> int | None:
    differ = [d for d, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not differ:
        return None
    if len(differ) > 1 or (one[differ[0]], two[differ[0]]) != (1, 2):
        raise ValueError("samples do not lie in one dimension")
    return differ[0]


@dataclass(frozen=True)
class Outer:
    """A matrix that multiplies tokens, ``y = W x``: its Jacobian has factors.

    Where the parameter is stored as the transpose, ``y = x P`` with P (i, o), ``dh/dP = sum_t x_t g_t^T`` and the
    factors change roles. Rows of P then belong to x, which the k observations of a sample share, and columns to
    g, of which each has its own: k observations are k times as many tokens, each with those of its own alone.

    Attributes:
        source: the matrix.
        swapped: whether P is stored so.
        unfold: the tokens (B, T, i) that a convolution multiplies, from its input; None of a linear layer.
    """

    source: Source
    swapped: bool = False
    unfold: Callable[[Tensor], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the parameter as it is stored."""
        o, i = self.source.value.flatten(1).shape
        return (i, o) if self.source.form == "transposed" else (o, i)

    def fits(self, layout: Layout) -> bool:
        """Whether the input's samples lie where the output's do."""
        return layout.out == layout.tensors[0] and (self.unfold is None or not layout.out)

    def piece(self, call: Call, layout: Layout, g: Tensor) -> Factors | Rows:
        """Factors from g (m, k, ...)."""
        x = call.tensors[0]
        if self.unfold is not None:
            g, x = g.flatten(-2).mT, self.unfold(x)
        g = _tokens(g, 2)
        x = _tokens(x if layout.out is None else x.movedim(layout.out, 0), 0 if layout.out is None else 1).to(g.dtype)
        if not self.swapped:
            return Factors(g, x)
        m, k = g.shape[:2]
        x = x.expand(m, *x.shape[-2:])
        if k == 1:
            return Factors(x.unsqueeze(1), g.squeeze(1))
        eye = torch.eye(k, dtype=g.dtype, device=g.device).view(1, k, k, 1, 1)
        return Factors((eye * x[:, None, None]).flatten(2, 3), g.flatten(1, 2))


@dataclass(frozen=True)
class Scale:
    """A parameter that is added, or multiplies entry by entry: ``y = f * p`` with f known.

    Attributes:
        source: the parameter.
        shape: as it is broadcast, aligned with the last dimensions of the output.
        operand: which of the call's tensors f is computed from; None where f is 1.
        factor: f from it, of the output's dimensions.
    """

    source: Source
    shape: Sequence[int]
    operand: int | None = None
    factor: Callable[[Tensor], Tensor] = _itself

    def fits(self, layout: Layout) -> bool:
        """Always."""
        return True

    def piece(self, call: Call, layout: Layout, g: Tensor) -> Factors | Rows:
        """Rows from g (m, k, ...)."""
        if layout.out is not None:
            g = g.unsqueeze(2 + layout.out)
        if self.operand is not None:
            f, dim = self.factor(call.tensors[self.operand]), layout.tensors[self.operand]
            f = f.unsqueeze(0) if dim is None else f.movedim(dim, 0).unsqueeze(1 + dim)
            f = f.view(f.shape[0], 1, *[1] * (g.dim() - 1 - f.dim()), *f.shape[1:])
            last = _ones_at_end(self.shape)
            if last and f.shape[-last:] == g.shape[-last:]:  # channels: each is one dot product, with nothing between
                dtype = torch.promote_types(torch.promote_types(g.dtype, f.dtype), torch.float32)
                dot = torch.linalg.vecdot(g.flatten(-last).to(dtype), f.flatten(-last).to(dtype))
                g = dot.view(*dot.shape, *[1] * last)
            else:
                g = g * f
        lead = g.dim() - len(self.shape)
        over = [*range(2, lead), *(lead + d for d, size in enumerate(self.shape) if size == 1)]
        if over:
            g = g.sum(over, keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32))
        return self.source.rows(g.reshape(g.shape[0] * g.shape[1], *self.source.value.shape))


@dataclass(frozen=True)
class Other:
    """A parameter in any other function, which is differentiated sample by sample.

    Attributes:
        source: the parameter.
        function: the function.
        arguments: args and kwargs, in whose place of tensors there are their numbers among those of the call.
        at: the numbers of those that the parameter stands for.
        autocast: as it was: device type, dtype, and whether it was on.
    """

    source: Source
    function: Callable[..., Any]
    arguments: tuple[Sequence[Any], Mapping[str, Any]]
    at: Sequence[int]
    autocast: tuple[str, torch.dtype, bool] = field(repr=False)

    def fits(self, layout: Layout) -> bool:
        """Always."""
        return True

    def piece(self, call: Call, layout: Layout, g: Tensor) -> Factors | Rows:
        """Rows from g (m, k, ...)."""
        leaves, spec = tree_flatten(self.arguments)
        own = [n for n, dim in enumerate(layout.tensors) if dim is not None]

        def rows_of(mine: Sequence[Tensor], g: Tensor) -> Tensor:
            tensors = list(call.tensors)
            for n, tensor in zip(own, mine, strict=True):
                tensors[n] = tensor.unsqueeze(layout.tensors[n])  # type: ignore[arg-type]

            def output(p: Tensor) -> Tensor:
                given = [p if n in self.at else tensor for n, tensor in enumerate(tensors)]
                filled = [given[leaf.number] if isinstance(leaf, Slot) else leaf for leaf in leaves]
                args, kwargs = tree_unflatten(filled, spec)
                device, dtype, enabled = self.autocast
                with torch.autocast(device, dtype, enabled, cache_enabled=False):
                    out: Tensor = self.function(*args, **kwargs)
                return out

            pull = vjp(output, self.source.value.detach())[1]
            (found,) = vmap(pull)(g if layout.out is None else g.unsqueeze(1 + layout.out))
            return found

        if not own:
            found = rows_of([], g.flatten(0, 1)) if layout.out is None else vmap(lambda g: rows_of([], g))(g)
        else:
            found = vmap(rows_of)([call.tensors[n].movedim(layout.tensors[n], 0) for n in own], g)  # type: ignore[arg-type]
        return self.source.rows(found.reshape(g.shape[0] * g.shape[1], *self.source.value.shape))


Use = Outer | Scale | Other


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor among the arguments of a call."""

    number: int


def joined(pieces: Sequence[Factors | Rows], factored: bool) -> Factors | Rows:
    """All uses of one parameter together: tokens of one where all have factors.

    Args:
        pieces: one or more parts of H.
        factored: whether the result has factors.

    Returns:
        Their sum.
    """
    if factored:
        factors = [piece for piece in pieces if isinstance(piece, Factors)]
        if len(factors) == 1:
            return factors[0]
        own = any(piece.own_x for piece in factors)
        xs = [piece.x.expand(len(piece.g), -1, -1) if own else piece.x for piece in factors]
        return Factors(torch.cat([piece.g for piece in factors], 2), torch.cat(xs, -2))
    rows = [piece.rows() for piece in pieces]
    total = rows[0]
    for more in rows[1:]:
        total = total + more
    return Rows(total)


def _ones_at_end(shape: Sequence[int]) -> int:
    return next((n for n, size in enumerate(reversed(shape)) if size != 1), len(shape))


def _tokens(tensor: Tensor, lead: int) -> Tensor:
    """(..., T, width) with `lead` dimensions before the tokens."""
    return tensor.unsqueeze(lead) if tensor.dim() == lead + 1 else tensor.flatten(lead, -2)
