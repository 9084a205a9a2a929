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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Linearisation:
    """A forward pass of the head, ready to be differentiated.

    Attributes:
        logits: (m, C) outputs at the current weights, detached.
        outputs: the same in the graph.
        inputs: (m, ...) what went in.
    """

    logits: Tensor
    outputs: Tensor
    inputs: Tensor
    _tape: Tape
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
        tape: dict[str, list[_Call]] = defaultdict(list)
        handles = [
            module.register_forward_hook(partial(_record, tape[name]), with_kwargs=True)
            for name, modules in self._modules.items()
            for module in modules
        ]
        try:
            with torch.enable_grad():
                outputs: Tensor = self.head(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return Linearisation(outputs.detach(), outputs, inputs, tape, self)

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
            rows = jacobian_rows(self.head, passed.inputs, cotangent, self._others)
            found.update({name: Rows(values) for name, values in rows.items()})
        return {layer.name: found[layer.name] for layer in self.layers}

    def _taped(self, passed: Linearisation, cotangent: Tensor) -> dict[str, Factors | Rows]:
        """What the tape gives: factors of weights, and rows of the biases beside them."""
        factors = self._factors(passed, cotangent)
        biases = {bias: Rows(factors[weight].g.sum(2).flatten(0, 1)) for bias, weight in self._biases.items()}
        return {**factors, **biases}

    def _factors(self, passed: Linearisation, cotangent: Tensor) -> dict[str, Factors]:
        calls = [(name, call) for name, tape in passed._tape.items() for call in tape]
        outputs, own = passed.outputs, [call.out for name, call in calls if not self._shared[name]]
        theirs = [call.out for name, call in calls if self._shared[name]]
        g_own = iter(_derivatives(outputs, own, cotangent, more=bool(theirs)))
        g_shared = iter(_derivatives_of_each(outputs, theirs, cotangent))
        pieces: dict[str, list[Factors]] = defaultdict(list)
        for name, call in calls:
            shared = self._shared[name]
            pieces[name].append(Factors(next(g_shared if shared else g_own), _tokens(call.x.detach(), shared)))
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
    tape: list[_Call], module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
) -> Tensor:
    tape.append(_Call(args[0] if args else kwargs["input"], output))
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


def _derivatives(outputs: Tensor, of: Sequence[Tensor], cotangent: Tensor, more: bool) -> list[Tensor]:
    """(m, k, T, o) for each tensor (m, ..., o): samples are independent, so that one pass serves them all."""
    if not of:
        return []
    if cotangent.shape[1] == 1:
        found = torch.autograd.grad(outputs, of, cotangent[:, 0], retain_graph=more, materialize_grads=True)
        return [_tokens(g, shared=False).unsqueeze(1) for g in found]
    found = torch.autograd.grad(
        outputs, of, cotangent.transpose(0, 1), retain_graph=more, materialize_grads=True, is_grads_batched=True
    )
    batched = [g.expand(cotangent.shape[1], *t.shape) for g, t in zip(found, of, strict=True)]  # not so where unused
    return [_tokens(g.flatten(0, 1), shared=False).unflatten(0, g.shape[:2]).transpose(0, 1) for g in batched]


def _derivatives_of_each(outputs: Tensor, of: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """(m, k, T, o) for each tensor (..., o) that all samples share: a pass for each sample and observation."""
    m, k, classes = cotangent.shape
    if not of:
        return []
    if m == 0:
        return [t.new_zeros(0, k, t[..., 0].numel(), t.shape[-1]) for t in of]
    each = torch.zeros(m, k, m, classes, dtype=cotangent.dtype, device=cotangent.device)
    each[torch.arange(m), :, torch.arange(m)] = cotangent
    found = torch.autograd.grad(outputs, of, each.flatten(0, 1), materialize_grads=True, is_grads_batched=True)
    return [g.expand(m * k, *t.shape).reshape(m, k, -1, t.shape[-1]) for g, t in zip(found, of, strict=True)]


def _joined(pieces: Sequence[Factors]) -> Factors:
    """The calls of one weight as tokens of one."""
    if len(pieces) == 1:
        return pieces[0]
    return Factors(torch.cat([p.g for p in pieces], 2), torch.cat([p.x for p in pieces], -2))
