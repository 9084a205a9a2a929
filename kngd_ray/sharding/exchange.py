"""Bringing each rank the observations' Jacobian of its own parts, in whichever form is fewer bytes.

A rank needs all M rows of H, but only the columns of the parts that it owns. For a sample with k observations and T
tokens, and o rows of a weight of i columns, that is ::

    as factors      T (k o + i) numbers; T k o where all samples share x, which every rank has
    as rows         k o i numbers

All parts of the given layers go in one all_to_all. What a rank sends itself is not moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kngd_ray.filters import Factors, Jacobian, Part, Rows
from kngd_ray.sharding.collectives import Group
from kngd_ray.sharding.ownership import Ownership


@dataclass(frozen=True)
class _Form:
    """How the rows of one part travel, known alike to sender and receiver.

    Attributes:
        part: the part.
        k: observations per sample.
        tokens: T of the layer's factors.
        own_x: whether each sample has an x of its own.
        reach: how many times as many numbers as rows factors may have and still travel as factors.
    """

    part: Part
    k: int
    tokens: int
    own_x: bool
    reach: float

    @property
    def as_factors(self) -> bool:
        return self.part.layer.factored and self.factor_numbers < self.reach * self.row_numbers

    @property
    def factor_numbers(self) -> int:
        """Numbers per sample as factors."""
        return self.tokens * (self.k * self.part.o + (self.part.layer.i if self.own_x else 0))

    @property
    def row_numbers(self) -> int:
        """Numbers per sample as rows."""
        return self.k * self.part.size

    @property
    def numbers(self) -> int:
        """Numbers per sample that travel."""
        return self.factor_numbers if self.as_factors else self.row_numbers

    def pack(self, H: Factors | Rows) -> list[Tensor]:
        """What is sent of the local samples."""
        mine = H.part(self.part.start, self.part.stop)
        if not self.as_factors:
            return [mine.rows().reshape(-1)]
        assert isinstance(mine, Factors)
        return [mine.g.reshape(-1), *([mine.x.reshape(-1)] if self.own_x else [])]

    def unpack(self, messages: Sequence[Tensor], samples: Sequence[int], H: Factors | Rows) -> Factors | Rows:
        """The part of H of all samples from every rank's message; the local H has a shared x."""
        if not self.as_factors:
            return Rows(torch.cat(list(messages)).view(-1, self.part.size).to(_row_dtype(H)))
        shape = (-1, self.k, self.tokens, self.part.o)
        sizes = [s * self.k * self.tokens * self.part.o for s in samples]
        assert isinstance(H, Factors)
        # layers of several dtypes travel in the widest
        g = torch.cat([message[:size] for message, size in zip(messages, sizes, strict=True)]).view(shape).to(H.g.dtype)
        if not self.own_x:
            return Factors(g, H.x)
        x = torch.cat([message[size:] for message, size in zip(messages, sizes, strict=True)])
        return Factors(g, x.view(-1, self.tokens, self.part.layer.i).to(H.x.dtype))


def exchange(
    group: Group, ownership: Ownership, H: Jacobian, samples: Sequence[int], k: int, reach: float = 1.0
) -> Jacobian:
    """Bring each rank its parts of H.

    Args:
        group: the ranks.
        ownership: who owns which parts.
        H: of the local samples, of some layers or all, the same on every rank.
        samples: number of samples on each rank.
        k: observations per sample.
        reach: factors travel as factors while they have fewer numbers than this many times the rows.

    Returns:
        The parts that this rank owns, for the samples of all ranks in rank order.
    """
    H = dict(H)  # each layer's is built once, where it is built when asked for
    if group.world_size == 1 or not H:
        return H
    forms = [[_form(x, k, H[x.layer.name], reach) for x in parts if x.layer.name in H] for parts in ownership.parts]
    empty = [torch.empty(0, dtype=next(iter(H.values())).dtype, device=next(iter(H.values())).device)]
    outgoing = [torch.cat(sum((form.pack(H[form.part.layer.name]) for form in rank), empty)) for rank in forms]
    own = forms[group.rank]
    received = group.exchange(outgoing, [s * sum(form.numbers for form in own) for s in samples])
    pieces = [message.split([s * form.numbers for form in own]) for message, s in zip(received, samples, strict=True)]
    return {
        form.part.layer.name: form.unpack([piece[n] for piece in pieces], samples, H[form.part.layer.name])
        for n, form in enumerate(own)
    }


def _row_dtype(H: Factors | Rows) -> torch.dtype:
    return H.dtype if isinstance(H, Rows) else torch.promote_types(H.g.dtype, H.x.dtype)


def _form(part: Part, k: int, H: Factors | Rows, reach: float) -> _Form:
    if isinstance(H, Rows):
        return _Form(part, k, 1, True, reach)
    return _Form(part, k, H.g.shape[2], H.own_x, reach)
