"""H of a network without n-sized rows: factors and rows of its parameters from one backward pass.

The Jacobian of a linear layer's weight is ``sum_t g_t x_t^T``, its input x and the derivative g with respect to
its output. One forward pass keeps the inputs of all functions that parameters are used in, one backward pass
through them gives every g, since samples are independent: the derivative of the sum over samples of one
observation each is that of every sample. No gradient of a weight is computed, and no layer's part of H
before it is asked for.

Which uses of a parameter are understood is found out, not assumed: where in a tensor the samples are shows
when the network sees one sample and two, and each parameter is tried on an example. Those whose gradient the
tape does not reproduce go through :func:`~kngd_ray.observations.jacobian.jacobian_rows`.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.utils._pytree import tree_flatten, tree_map

from kngd_ray.errors import FilterError
from kngd_ray.filters import Factors, Jacobian, Layer, Rows
from kngd_ray.observations._passes import (
    Group,
    LazyJacobian,
    Place,
    Places,
    by_place,
    layouts,
    matrices,
    pulled,
    pulled_by,
)
from kngd_ray.observations._tape import Tape
from kngd_ray.observations._uses import Call, Layout, Use, joined
from kngd_ray.observations.jacobian import Inputs, jacobian_rows, trainable

_TOLERANCE = 1e-3  # of a gradient's norm, between two ways to compute it in float32
_ROUGH = 3e-2  # the same in 16 bits
_SHAKEN = 0.01  # standard deviation that weights which are all alike are moved by
_LARGE = 3_000_000  # weights of a network, more than adapters have, from which on H is made layer by layer
_NUMBERS = 1 << 28  # of one parameter's rows, 1 GB in float32
_PASSES = 64  # sample by sample and observation by observation, of a large network


@dataclass(frozen=True)
class Linearisation:
    """A forward pass of the network, ready to be differentiated.

    Attributes:
        logits: (m, C) outputs at the current weights, detached.
        outputs: the same in the graph.
        inputs: (m, ...) what went in, a tensor or several by name.
        theta: weights by name that stood in for the network's own; None for these.
    """

    logits: Tensor
    outputs: Tensor
    inputs: Inputs
    theta: Mapping[str, Tensor] | None
    _places: Places
    _groups: Sequence[Group]
    _empty: bool  # a sample of the example stood in for none
    _owner: "Linearizer"

    def jacobian(self, cotangent: Tensor) -> Jacobian:
        """H by layer, in the order of the network's parameters.

        Args:
            cotangent: (m, k, C) derivative of each observation with respect to the logits.

        Returns:
            Factors of weights that multiply tokens, rows of everything else. That of a large network is made
            layer by layer, each time that one is asked for, and not kept.
        """
        return self._owner._jacobian(self, cotangent.to(self.logits.dtype))


class Linearizer:
    """Linearises a network at its current weights.

    Args:
        head: maps (m, ...) inputs, a tensor or several by name, to (m, C) outputs, samples independent of one another.
        example: (1 or more, ...) inputs, on which it is found out how parameters are used.
    """

    def __init__(self, head: nn.Module, example: Inputs) -> None:
        self.head = head
        self._parameters = parameters = trainable(head)  # to be asked for at each pass takes as long as its products
        self._large = sum(p.numel() for p in head.parameters()) > _LARGE
        self._names: Collection[str] = set(parameters)
        self._layouts: dict[Place, Layout] = {}
        self._matrices: dict[str, tuple[int, int]] = {}
        self._one = one = tree_map(lambda x: x[:1].detach(), example)
        uses = [self.run(x)._places for x in (one, tree_map(lambda x: torch.cat([x, x]), one))]
        self._layouts, refused = layouts(*uses)
        self._names = set(parameters) - refused
        self._matrices = matrices(use for (name, _), (_, use) in uses[0].items() if name in self._names)
        self._names = self._reproduced(tree_map(lambda x: x[:2], example) if self._large else example)
        self.layers = [self._layer(name, p) for name, p in parameters.items()]

    def run(self, inputs: Inputs) -> Linearisation:
        """One forward pass.

        Args:
            inputs: (m, ...) one batch.

        Returns:
            The outputs, and the way to their Jacobian.
        """
        given, empty = self._given(inputs)
        parameters = {name: p for name, p in self._parameters.items() if name in self._names}
        with torch.enable_grad(), Tape(parameters) as tape:
            outputs: Tensor = self.head(given)
        places = by_place(tape.calls)
        own, theirs = self._split(places)
        pull = partial(pulled, outputs, looped=self._large)
        groups = [
            Group(own, partial(pull, own, bool(theirs)), shared=False),
            Group(theirs, partial(pull, theirs, False), shared=True),
        ]
        logits = outputs.detach()[: 0 if empty else None]
        return Linearisation(logits, outputs, inputs, None, places, groups, empty, self)

    def run_at(self, theta: Mapping[str, Tensor], inputs: Inputs) -> Linearisation:
        """One forward pass at other weights than the network's, as a function that ``torch.func`` may transform.

        Args:
            theta: trainable weights by name.
            inputs: (m, ...) one batch.

        Returns:
            The outputs, and the way to their Jacobian.
        """
        given, empty = self._given(inputs)
        parameters = {name: p for name, p in theta.items() if name in self._names}

        def outputs(nudges: Mapping[int, Tensor]) -> Tensor:
            with Tape(parameters, functional=True, nudges=nudges):
                logits: Tensor = functional_call(self.head, dict(theta), (given,))
            return logits

        with torch.enable_grad(), Tape(parameters, functional=True) as tape:
            logits: Tensor = functional_call(self.head, dict(theta), (given,))
        numbers = {id(call): number for number, call in enumerate(tape.calls)}

        def group(calls: Sequence[Call], shared: bool) -> Group:
            nudges = {numbers[id(call)]: torch.zeros_like(call.like).contiguous() for call in calls}
            return Group(calls, partial(pulled_by, vjp(outputs, nudges)[1]) if nudges else lambda _: [], shared)

        places = by_place(tape.calls)
        own, theirs = self._split(places)
        groups = [group(own, shared=False), group(theirs, shared=True)]
        return Linearisation(logits[: 0 if empty else None], logits, inputs, theta, places, groups, empty, self)

    def _given(self, inputs: Inputs) -> tuple[Inputs, bool]:
        """A batch, or in the place of an empty one, which few networks take, one sample; and whether it was empty."""
        if len(tree_flatten(inputs)[0][0]):
            return inputs, False
        return tree_map(lambda x, like: x.to(like), self._one, inputs), True

    def _split(self, places: Places) -> tuple[list[Call], list[Call]]:
        """The calls of whose output each sample has its own, and those whose output all share."""
        own: dict[int, Call] = {}
        theirs: dict[int, Call] = {}
        for place, (call, _) in places.items():
            if place in self._layouts:
                (theirs if self._layouts[place].out is None else own)[id(call)] = call
        return list(own.values()), list(theirs.values())

    def _layer(self, name: str, p: Tensor) -> Layer:
        if name in self._names and name in self._matrices:
            return Layer(name, *self._matrices[name], factored=True)
        return Layer(name, p.numel(), 1, factored=False)

    def _reproduced(self, example: Inputs) -> set[str]:
        """The parameters whose gradient the tape gives."""
        parameters = {name: p for name, p in self._parameters.items() if name in self._names}
        if not parameters:
            return set()
        with _shaken(self.head):
            passed = self.run(example)
            m, classes = passed.logits.shape
            # neither zero nor opposite weights, between which a use of a parameter could cancel
            v = torch.linspace(1, 2, classes, dtype=passed.logits.dtype, device=passed.logits.device)
            expected = torch.autograd.grad(
                passed.outputs,
                list(parameters.values()),
                v.expand_as(passed.logits),
                retain_graph=True,
                allow_unused=True,
            )
            make = self._taped(passed, v.expand(m, 1, classes))
            one = torch.ones(m, device=v.device)
            rough = any(call.like.dtype.itemsize < 4 for call, _ in passed._places.values())
            good = set()
            for (name, p), gradient in zip(parameters.items(), expected, strict=True):
                wanted = torch.zeros_like(p) if gradient is None else gradient
                try:
                    found = make(name).combine(one).view_as(p)
                except (RuntimeError, TypeError, IndexError):  # a function that cannot be called sample by sample
                    continue
                if (found - wanted).norm() <= (_ROUGH if rough else _TOLERANCE) * wanted.norm():
                    good.add(name)
        return good

    def _jacobian(self, passed: Linearisation, cotangent: Tensor) -> Jacobian:
        empty, k = passed._empty, cotangent.shape[1]
        known = {layer.name for layer in self.layers} & set(self._names)
        known -= {place[0] for place in passed._places if place not in self._layouts}
        others = {layer.name: layer.size for layer in self.layers if layer.name not in known}
        rows: Mapping[str, Tensor] = {}
        if others:
            M = cotangent.shape[0] * cotangent.shape[1]
            _affordable(others, M, passes=M if self._large else 0)
        made = self._taped(passed, cotangent.new_zeros(1, *cotangent.shape[1:]) if empty else cotangent)
        if others:
            rows = jacobian_rows(self.head, passed.inputs, cotangent, set(others), passed.theta)

        def make(name: str) -> Factors | Rows:
            if name in rows:
                return Rows(rows[name])
            return made(name).take(0, 0, k) if empty else made(name)

        lazy = LazyJacobian([layer.name for layer in self.layers], make)
        return lazy if self._large else dict(lazy)

    def _taped(self, passed: Linearisation, cotangent: Tensor) -> Callable[[str], Factors | Rows]:
        """What makes a layer's part of H from the tape, after the backward pass."""
        found = {
            id(call): g
            for group in passed._groups
            for call, g in zip(group.calls, group.derivatives(cotangent), strict=True)
        }
        uses: dict[str, list[tuple[Call, Use, Layout, Tensor]]] = defaultdict(list)
        for place, (call, use) in passed._places.items():
            if place in self._layouts and id(call) in found:
                uses[place[0]].append((call, use, self._layouts[place], found[id(call)]))
        sizes = {name: p.numel() for name, p in self._parameters.items()}
        make = partial(self._made, sizes, uses, cotangent)
        if not self._large:
            return make
        # rows that are fewer numbers than what they are made of take its place
        M = cotangent.shape[0] * cotangent.shape[1]
        small = [
            name
            for name, found_of in uses.items()
            if name not in self._matrices and M * sizes[name] <= sum(g.numel() for *_, g in found_of)
        ]
        rows = {}
        for name in small:
            try:
                rows[name] = make(name)
            except RuntimeError:  # it is for the caller to ask for, and to see
                continue
            del uses[name]
        return lambda name: rows[name] if name in rows else make(name)

    def _made(
        self,
        sizes: Mapping[str, int],
        uses: Mapping[str, Sequence[tuple[Call, Use, Layout, Tensor]]],
        cotangent: Tensor,
        name: str,
    ) -> Factors | Rows:
        m, k, _ = cotangent.shape
        factored = name in self._matrices
        if name not in uses:  # nothing depends on it
            zero = cotangent.new_zeros(())
            if not factored:
                return Rows(zero.expand(m * k, sizes[name]))
            o, i = self._matrices[name]
            return Factors(zero.expand(m, k, 1, o), zero.expand(m, 1, i))
        if not factored:
            _affordable({name: sizes[name]}, m * k)
        pieces = [use.piece(call, layout, layout.by_sample(g, m, k)) for call, use, layout, g in uses[name]]
        return joined(pieces, factored)


@contextmanager
def _shaken(head: nn.Module) -> Iterator[None]:
    """Move all weights at random for a while: behind a layer that starts at zero, any gradient would look right."""
    generator = torch.Generator().manual_seed(0)
    kept = [(p, p.detach().clone()) for p in trainable(head).values()]
    try:
        with torch.no_grad():
            for p, value in kept:
                spread = 0.1 * float(value.std(correction=0)) + _SHAKEN
                p.add_(spread * torch.randn(value.shape, generator=generator).to(value))
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def _affordable(sizes: Mapping[str, int], M: int, passes: int = 0) -> None:
    """Refuse rows that do not fit, or that would take a pass of a large network each.

    Args:
        sizes: of the parameters whose rows are to be formed.
        M: observations.
        passes: of a large network that it takes.

    Raises:
        FilterError: it is too much.
    """
    numbers = M * sum(sizes.values())
    if numbers <= _NUMBERS and passes <= _PASSES:
        return
    names = ", ".join(list(sizes)[:5]) + (f" and {len(sizes) - 5} more" if len(sizes) > 5 else "")
    raise FilterError(
        f"the Kalman filter would need {numbers:.1e} numbers for the derivatives of {M} observations with respect to "
        f"{names}, which has no cheaper form: leave it out with tune.exclude, lower batch_size, or use method=adamw."
    )
