"""H of a head without n-sized rows: the factors of its linear layers from one backward pass.

The Jacobian of a linear layer's weight is ``sum_t g_t x_t^T``, its input x and the derivative g with
respect to its output. One forward pass keeps the inputs and outputs of all linear layers, one backward
pass through them gives every g, since samples are independent: the derivative of the sum over samples of
one observation each is that of every sample. What is neither a linear layer's weight nor its bias goes
through :func:`~kngd_ray.observations.jacobian.jacobian_rows`.

Which layers have factors is found out, not assumed: a layer that is called with something else than
the batch in dimension 0, that shares its weight with another module, or whose weight is used outside of
its call, is tried on one sample, and has rows where the factors do not reproduce its gradient.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from kngd_ray.filters import Factors, Jacobian, Layer, Rows
from kngd_ray.observations.jacobian import jacobian_rows, trainable

_TOLERANCE = 1e-3  # of a gradient's norm, between two ways to compute it in float32
_SHAKEN = 0.01  # standard deviation that weights which are all alike are moved by


@dataclass(frozen=True)
class _Call:
    """One call of a linear layer: its input, and its output in the graph."""

    x: Tensor
    out: Tensor


Tape = Mapping[str, Sequence[_Call]]

# From (q, m, C) cotangents of the logits the derivatives (q, ...) with respect to the outputs of calls, in their order.
Pull = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Linearisation:
    """A forward pass of the head, ready to be differentiated.

    Attributes:
        logits: (m, C) outputs at the current weights, detached.
        outputs: the same in the graph.
        inputs: (m, ...) what went in.
        theta: weights by name that stood in for the head's own; None for these.
    """

    logits: Tensor
    outputs: Tensor
    inputs: Tensor
    theta: Mapping[str, Tensor] | None
    _tape: Tape
    _own: Pull  # to the calls whose input is each sample's own
    _shared: Pull  # to those whose input all samples share
    _owner: "Linearizer"

    def jacobian(self, cotangent: Tensor) -> Jacobian:
        """H by layer, in the order of the head's parameters.

        Args:
            cotangent: (m, k, C) derivative of each observation with respect to the logits.

        Returns:
            Factors of linear layers' weights, rows of everything else.
        """
        return self._owner._jacobian(self, cotangent.to(self.logits.dtype))


class Linearizer:
    """Linearises a head at its current weights.

    Args:
        head: maps (m, ...) inputs to (m, C) outputs, samples independent of one another.
        example: (1 or more, ...) inputs, on which it is found out which layers have factors.
    """

    def __init__(self, head: nn.Module, example: Tensor) -> None:
        self.head = head
        parameters = trainable(head)
        self._modules = {name: modules for name, modules in _linear_weights(head).items() if name in parameters}
        self._shared: dict[str, bool] = {}
        self._biases: dict[str, str] = {}
        self._others: set[str] = set()
        one = example[:1]
        self._shared = _shared_inputs(self.run(one)._tape, self.run(torch.cat([one, one]))._tape)
        self._keep(self._shared)
        self._biases = _biases(head, self._modules, parameters)
        self._keep(self._reproduced(example, {x: parameters[x] for x in (*self._modules, *self._biases)}))
        self.layers = [
            Layer(name, p.shape[0], p.shape[1], factored=True)
            if name in self._modules
            else Layer(name, p.numel(), 1, factored=False)
            for name, p in parameters.items()
        ]
        self._others = {name for name in parameters if name not in self._modules and name not in self._biases}

    def run(self, inputs: Tensor) -> Linearisation:
        """One forward pass.

        Args:
            inputs: (m, ...) one batch.

        Returns:
            The outputs, and the way to their Jacobian.
        """
        with torch.enable_grad(), self._taping() as tape:
            outputs: Tensor = self.head(inputs)
        own, theirs = ([call.out for _, call in self._calls(tape, shared)] for shared in (False, True))
        pulls = partial(_pulled, outputs, own, bool(theirs)), partial(_pulled, outputs, theirs, False)
        return Linearisation(outputs.detach(), outputs, inputs, None, tape, *pulls, self)

    def run_at(self, theta: Mapping[str, Tensor], inputs: Tensor) -> Linearisation:
        """One forward pass at other weights than the head's, as a function that ``torch.func`` may transform.

        Args:
            theta: trainable weights by name.
            inputs: (m, ...) one batch.

        Returns:
            The outputs, and the way to their Jacobian.
        """

        def outputs(nudges: Mapping[str, Sequence[Tensor]]) -> Tensor:
            with self._taping(nudges):
                logits: Tensor = functional_call(self.head, dict(theta), (inputs,))
            return logits

        with self._taping() as tape:
            logits: Tensor = functional_call(self.head, dict(theta), (inputs,))

        def pull_to(shared: bool) -> Pull:
            nudges: dict[str, list[Tensor]] = defaultdict(list)
            for name, call in self._calls(tape, shared):
                nudges[name].append(torch.zeros_like(call.out))
            return partial(_pulled_by, vjp(outputs, dict(nudges))[1]) if nudges else lambda _: []

        return Linearisation(logits, logits, inputs, theta, tape, pull_to(shared=False), pull_to(shared=True), self)

    @contextmanager
    def _taping(self, nudges: Mapping[str, Sequence[Tensor]] = MappingProxyType({})) -> Iterator[Tape]:
        """Record the calls of linear layers, and add nudges to the outputs of those that have some."""
        tape: dict[str, list[_Call]] = defaultdict(list)
        handles = [
            module.register_forward_hook(partial(_record, tape[name], nudges.get(name, ())), with_kwargs=True)
            for name, modules in self._modules.items()
            for module in modules
        ]
        try:
            yield tape
        finally:
            for handle in handles:
                handle.remove()

    def _calls(self, tape: Tape, shared: bool) -> list[tuple[str, _Call]]:
        """The calls whose input all samples share, or of which each has its own; before it is known, all are own."""
        return [
            (name, call) for name, calls in tape.items() if self._shared.get(name, False) == shared for call in calls
        ]

    def _keep(self, names: Collection[str]) -> None:
        self._modules = {name: modules for name, modules in self._modules.items() if name in names}
        self._biases = {bias: weight for bias, weight in self._biases.items() if {bias, weight} <= set(names)}

    def _reproduced(self, example: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
        """The parameters whose gradient the tape gives."""
        if not parameters:
            return set()
        with _shaken(self.head):
            passed = self.run(example)
            classes = passed.logits.shape[1]
            # neither zero nor opposite weights, between which a use of a parameter could cancel
            v = torch.linspace(1, 2, classes, dtype=passed.logits.dtype, device=example.device)
            expected = torch.autograd.grad(
                passed.outputs,
                list(parameters.values()),
                v.expand_as(passed.logits),
                retain_graph=True,
                materialize_grads=True,
            )
            found = self._taped(passed, v.expand(len(example), 1, classes))
        one = torch.ones(len(example), device=example.device)
        return {
            name
            for (name, p), gradient in zip(parameters.items(), expected, strict=True)
            if (found[name].combine(one).view_as(p) - gradient).norm() <= _TOLERANCE * gradient.norm()
        }

    def _jacobian(self, passed: Linearisation, cotangent: Tensor) -> Jacobian:
        found = self._taped(passed, cotangent)
        if self._others:
            rows = jacobian_rows(self.head, passed.inputs, cotangent, self._others, passed.theta)
            found.update({name: Rows(values) for name, values in rows.items()})
        return {layer.name: found[layer.name] for layer in self.layers}

    def _taped(self, passed: Linearisation, cotangent: Tensor) -> dict[str, Factors | Rows]:
        """What the tape gives: factors of weights, and rows of the biases beside them."""
        factors = self._factors(passed, cotangent)
        biases = {bias: Rows(factors[weight].g.sum(2).flatten(0, 1)) for bias, weight in self._biases.items()}
        return {**factors, **biases}

    def _factors(self, passed: Linearisation, cotangent: Tensor) -> dict[str, Factors]:
        pieces: dict[str, list[Factors]] = defaultdict(list)
        for shared in (False, True):
            calls = self._calls(passed._tape, shared)
            if calls:
                derive, pull = (_derivatives_of_each, passed._shared) if shared else (_derivatives, passed._own)
                for (name, call), g in zip(calls, derive(pull, cotangent), strict=True):
                    pieces[name].append(Factors(g, _tokens(call.x.detach(), shared)))
        return {name: _joined(parts) for name, parts in pieces.items()}


@contextmanager
def _shaken(head: nn.Module) -> Iterator[None]:
    """Move all weights at random for a while: behind a layer that starts at zero, any gradient would look right."""
    generator = torch.Generator().manual_seed(0)
    kept = [(p, p.detach().clone()) for p in trainable(head).values()]
    with torch.no_grad():
        for p, value in kept:
            spread = 0.1 * float(value.std(correction=0)) + _SHAKEN
            p.add_(spread * torch.randn(value.shape, generator=generator).to(value))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def _record(
    tape: list[_Call],
    nudges: Sequence[Tensor],
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    output: Tensor,
) -> Tensor:
    tape.append(_Call(args[0] if args else kwargs["input"], output))
    if nudges:
        return output + nudges[len(tape) - 1]
    return output.clone()  # a ReLU in place would overwrite the tensor that g is the derivative with respect to


def _linear_weights(head: nn.Module) -> dict[str, list[nn.Module]]:
    """For each parameter that is the weight of linear layers and of nothing else, those layers."""
    names = {id(p): name for name, p in head.named_parameters()}
    users: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in head.modules():
        for role, parameter in module.named_parameters(recurse=False):
            users[names[id(parameter)]].append((module, role))
    return {
        name: [module for module, _ in found]
        for name, found in users.items()
        if all(isinstance(module, nn.Linear) and role == "weight" for module, role in found)
    }


def _biases(head: nn.Module, modules: Mapping[str, Sequence[nn.Module]], wanted: Collection[str]) -> dict[str, str]:
    """The biases whose rows are the g of a weight: bias by name, and the weight that has its g."""
    names = {id(p): name for name, p in head.named_parameters()}
    users: dict[str, set[str]] = defaultdict(set)
    owners: dict[str, int] = defaultdict(int)
    for module in head.modules():
        for parameter in module.parameters(recurse=False):
            owners[names[id(parameter)]] += 1
    for weight, found in modules.items():
        for module in found:
            if isinstance(module, nn.Linear) and module.bias is not None:
                users[names[id(module.bias)]].add(weight)
    return {
        bias: next(iter(weights))
        for bias, weights in users.items()
        if bias in wanted and len(weights) == 1 and owners[bias] == len(modules[next(iter(weights))])
    }


def _shared_inputs(one: Tape, two: Tape) -> dict[str, bool]:
    """Of each layer that was called, whether all samples share its input; what is neither is left out."""
    found = {}
    for name, calls in one.items():
        if not calls or len(calls) != len(two[name]):
            continue
        shapes = [(a.x.shape, b.x.shape) for a, b in zip(calls, two[name], strict=True)]
        if all(a == b for a, b in shapes):
            found[name] = True
        elif all(a[1:] == b[1:] and (a[0], b[0]) == (1, 2) and len(a) > 1 for a, b in shapes):
            found[name] = False
    return found


def _tokens(tensor: Tensor, shared: bool) -> Tensor:
    """(m, T, width), or (T, width) where samples share it, of a layer's input or output."""
    if shared:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


def _pulled(outputs: Tensor, of: Sequence[Tensor], more: bool, cotangents: Tensor) -> list[Tensor]:
    """A :data:`Pull` through the graph of outputs (m, C), which is kept if there are more."""
    if not len(cotangents):
        return [t.new_zeros(0, *t.shape) for t in of]
    grad = partial(torch.autograd.grad, outputs, of, retain_graph=more, materialize_grads=True)
    if len(cotangents) == 1:
        return [g.unsqueeze(0) for g in grad(cotangents[0])]
    found = grad(cotangents, is_grads_batched=True)
    return [g.expand(len(cotangents), *t.shape) for g, t in zip(found, of, strict=True)]  # not batched where unused


def _pulled_by(pull: Callable[[Tensor], tuple[Mapping[str, Sequence[Tensor]]]], cotangents: Tensor) -> list[Tensor]:
    """A :data:`Pull` from what ``torch.func.vjp`` gave."""
    (found,) = vmap(pull)(cotangents)
    return [g for calls in found.values() for g in calls]


def _derivatives(pull: Pull, cotangent: Tensor) -> list[Tensor]:
    """(m, k, T, o) for calls on (m, ..., o): samples are independent, so that one pass serves them all."""
    found = pull(cotangent.transpose(0, 1))
    return [_tokens(g.flatten(0, 1), shared=False).unflatten(0, g.shape[:2]).transpose(0, 1) for g in found]


def _derivatives_of_each(pull: Pull, cotangent: Tensor) -> list[Tensor]:
    """(m, k, T, o) for calls on (..., o) that all samples share: a pass for each sample and observation."""
    m, k, _ = cotangent.shape
    each = cotangent.permute(1, 2, 0).diag_embed().permute(2, 0, 3, 1)  # (m, k, m, C), zero but for the sample's own
    return [g.flatten(1, -2).unflatten(0, (m, k)) for g in pull(each.flatten(0, 1))]


def _joined(pieces: Sequence[Factors]) -> Factors:
    """The calls of one weight as tokens of one."""
    if len(pieces) == 1:
        return pieces[0]
    return Factors(torch.cat([p.g for p in pieces], 2), torch.cat([p.x for p in pieces], -2))
