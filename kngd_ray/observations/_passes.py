"""The calls of one forward pass: which use of a parameter is which, where its samples are, and the way back to it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from kngd_ray.filters import Factors, Rows
from kngd_ray.observations._uses import Call, Layout, Outer, Use

# From (q, m, C) cotangents of the logits the derivatives (q, ...) with respect to the outputs of calls, in their order.
Pull = Callable[[Tensor], Sequence[Tensor]]

# A use of a parameter: its name, and how many came before it.
Place = tuple[str, int]

# All uses of parameters in one pass.
Places = Mapping[Place, tuple[Call, Use]]


@dataclass(frozen=True)
class Group:
    """Calls that are differentiated together.

    Attributes:
        calls: the calls.
        pull: to their outputs.
        shared: whether all samples share their outputs, so that each needs a pass of its own.
    """

    calls: Sequence[Call]
    pull: Pull
    shared: bool

    def derivatives(self, cotangent: Tensor) -> Sequence[Tensor]:
        """For each call (k, ...), or (m k, ...) where samples share its output, for a cotangent (m, k, C)."""
        if not self.calls:
            return []
        if not self.shared:
            return self.pull(cotangent.transpose(0, 1))
        # (m, k, m, C), zero but for the sample's own
        each = cotangent.permute(1, 2, 0).diag_embed().permute(2, 0, 3, 1)
        return self.pull(each.flatten(0, 1))


class LazyJacobian(Mapping[str, Factors | Rows]):
    """H of which a layer is made when it is asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Factors | Rows]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Factors | Rows:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def by_place(calls: Sequence[Call]) -> Places:
    """Every use of a parameter."""
    count: Counter[str] = Counter()
    found = {}
    for call in calls:
        for use in call.uses:
            name = use.source.name
            found[name, count[name]] = call, use
            count[name] += 1
    return found


def layouts(one: Places, two: Places) -> tuple[dict[Place, Layout], set[str]]:
    """Where samples are in each use that is the same for one sample and for two, and the parameters with others."""
    found, refused = {}, set()
    for place in one.keys() | two.keys():
        if place in one and place in two:
            (call, use), (other, _) = one[place], two[place]
            layout = Layout.of(call, other)
            if layout is not None and use.fits(layout):
                found[place] = layout
                continue
        refused.add(place[0])
    return found, refused


def matrices(uses: Iterable[Use]) -> dict[str, tuple[int, int]]:
    """The parameters all of whose uses are as one and the same matrix, and its rows and columns."""
    shapes: dict[str, set[tuple[int, int] | None]] = defaultdict(set)
    for use in uses:
        shapes[use.source.name].add(use.shape if isinstance(use, Outer) else None)
    return {name: shape for name, (shape, *more) in shapes.items() if shape is not None and not more}


def pulled(outputs: Tensor, calls: Sequence[Call], more: bool, cotangents: Tensor, *, looped: bool) -> list[Tensor]:
    """A :data:`Pull` through the graph of outputs (m, C), which is kept if there are more."""
    q = len(cotangents)
    if not q:
        return [call.like.new_zeros(0, *call.like.shape) for call in calls]
    grad = partial(torch.autograd.grad, outputs, [call.edge for call in calls], allow_unused=True)
    found: Sequence[Tensor | None]
    if q == 1:
        found = [None if g is None else g.unsqueeze(0) for g in grad(cotangents[0], retain_graph=more)]
    elif looped:
        rounds = [grad(v, retain_graph=more or n < q - 1) for n, v in enumerate(cotangents)]
        found = [None if gs[0] is None else torch.stack(gs) for gs in zip(*rounds, strict=True)]
    else:
        found = grad(cotangents, is_grads_batched=True, retain_graph=more)
    return [
        call.like.new_zeros(()).expand(q, *call.like.shape) if g is None else g.reshape(q, *call.like.shape)
        for g, call in zip(found, calls, strict=True)
    ]


def pulled_by(pull: Callable[[Tensor], tuple[Mapping[int, Tensor]]], cotangents: Tensor) -> list[Tensor]:
    """A :data:`Pull` from what ``torch.func.vjp`` gave."""
    (found,) = vmap(pull)(cotangents)
    return list(found.values())
