"""A tape of what happens to parameters in a forward pass: every function that is called with one of them.

It sees functions, not modules, so that it makes no difference whether a weight is used by nn.Linear, as
``x @ self.proj``, or inside of nn.MultiheadAttention. A parameter is recognised by identity, also through
views and casts of it on the way to its use.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from kngd_ray.observations._calls import READERS
from kngd_ray.observations._uses import Call, Other, Scale, Slot, Source, Use

_Function = Callable[..., Any]

_DETACHING = {torch.detach, Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
_CASTS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
_CASTS |= {Tensor.contiguous, Tensor.clone, torch.clone}
_RESHAPES = {Tensor.view, Tensor.view_as, Tensor.reshape, Tensor.reshape_as, Tensor.flatten, Tensor.unflatten}
_RESHAPES |= {Tensor.unsqueeze, Tensor.squeeze, torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze}
_TRANSPOSES = {Tensor.t, torch.t, Tensor.mT.__get__, Tensor.T.__get__, Tensor.transpose, torch.transpose}  # type: ignore[attr-defined]
_TRANSPOSES |= {Tensor.permute, torch.permute, Tensor.swapaxes, Tensor.adjoint}
_EXPANDS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to}


class Tape(TorchFunctionMode):
    """Records calls while it is active.

    Args:
        parameters: what stands for the parameters, by name.
        functional: whether the pass is one of ``torch.func``, of which there is no graph.
        nudges: what is added to the outputs of calls, by the call's number.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        functional: bool = False,
        nudges: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        # the tensors are held, so that no other can get the id of one
        self._sources = {id(p): Source(name, p, p) for name, p in parameters.items()}
        self._functional = functional
        self._nudges = nudges or {}

    def __torch_function__(
        self, func: _Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, and record it where a parameter is among its arguments."""
        kwargs = kwargs or {}
        among = self._among(args) or (kwargs and self._among(kwargs.values()))
        if not among or not torch.is_grad_enabled() or func in _DETACHING or "out" in kwargs:
            return func(*args, **kwargs)
        reader = READERS.get(func)
        if reader is not None:
            done = reader(self, *args, **kwargs)
            if done is not None:
                return done
        return self._called(func, args, kwargs)

    def _among(self, values: Any) -> bool:
        for value in values:
            if id(value) in self._sources or (isinstance(value, (list, tuple)) and self._among(value)):
                return True
        return False

    def source(self, value: Any) -> Source | None:
        """What a tensor is made of, if that is one parameter."""
        return self._sources.get(id(value))

    def _called(self, func: _Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Any function: a view or function of one parameter alone, or a use of one or several."""
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        known = {id(tensor): source for tensor in tensors if (source := self.source(tensor))}
        out = func(*args, **kwargs)
        if _without_gradient(func):
            return out
        source, *more = known.values()
        by_shape = func in _CASTS or func in _RESHAPES or func in _EXPANDS  # another tensor is a pattern only
        if by_shape and tensors[0] is not source.value:
            return out
        if func in _EXPANDS:
            return self.record([Scale(source, source.value.shape)], [], out, fresh=False)
        if not more and (by_shape or len(tensors) == sum(tensor is source.value for tensor in tensors)):
            self._derive(source, func, args, kwargs, out)
            return out
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        return self._other(func, args, kwargs, tensors, out)

    def _derive(self, source: Source, func: _Function, args: Any, kwargs: Any, out: Any) -> None:
        """Remember what is made of a parameter alone."""
        if isinstance(out, (list, tuple)):
            for n, tensor in enumerate(out):
                self._derive(source, lambda *a, n=n, **kw: func(*a, **kw)[n], args, kwargs, tensor)
            return
        if not isinstance(out, Tensor) or not out.is_floating_point() or id(out) in self._sources:
            return

        def make(parameter: Tensor) -> Tensor:
            value = source.make(parameter)
            filled = tree_map(lambda leaf: value if leaf is source.value else leaf, (tuple(args), dict(kwargs)))
            made: Tensor = func(*filled[0], **filled[1])
            return made

        form = source.form
        if func in _TRANSPOSES and source.is_matrix and out.stride() == source.value.stride()[::-1]:
            form = "transposed" if form == "same" else "same"
        elif not (func in _CASTS or (func in _RESHAPES and form == "same")):
            form = "other"
        self._sources[id(out)] = Source(source.name, source.parameter, out, form, make)

    def _other(self, func: _Function, args: Any, kwargs: Any, tensors: Sequence[Tensor], out: Tensor) -> Tensor:
        numbers = iter(range(len(tensors)))
        arguments = tree_map(
            lambda leaf: Slot(next(numbers)) if isinstance(leaf, Tensor) else leaf, (tuple(args), dict(kwargs))
        )
        device = out.device.type
        autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        at: dict[int, list[int]] = {}
        for n, tensor in enumerate(tensors):
            if self.source(tensor):
                at.setdefault(id(tensor), []).append(n)
        uses = [Other(self._sources[which], func, arguments, places, autocast) for which, places in at.items()]
        return self.record(uses, tensors, out, fresh=False)

    def record(self, uses: Sequence[Use], tensors: Sequence[Tensor], out: Tensor, fresh: bool = True) -> Tensor:
        """Keep a call.

        Args:
            uses: of the parameters in it.
            tensors: its other tensors.
            out: its output.
            fresh: whether no other tensor shares the memory of the output, unless by views of it.

        Returns:
            The output as what follows is to see it.
        """
        if not uses:
            return out
        like = torch.empty((), dtype=out.dtype, device=out.device).expand(out.shape)
        edge = None
        if not self._functional:
            edge, out = _edge(out, fresh)
        elif len(self.calls) in self._nudges:
            out = out + self._nudges[len(self.calls)]
        self.calls.append(Call(uses, [tensor.detach() for tensor in tensors], like, edge))
        return out


def _edge(out: Tensor, fresh: bool) -> tuple[GradientEdge, Tensor]:
    """Where an output is in the graph, and the output.

    The place in the graph stays what it is when the output is overwritten, as a ReLU in place does, except where
    the output is a view of what is overwritten: then it is the place of that.
    """
    if not out._is_view():
        return get_gradient_edge(out), out
    base = out._base
    same = base is not None and base.grad_fn is not None and base.numel() == out.numel()
    if fresh and base is not None and same and base.is_contiguous() and out.is_contiguous():
        return get_gradient_edge(base), out
    out = out.clone()
    return get_gradient_edge(out), out


def _without_gradient(func: _Function) -> bool:
    """Whether a function's result depends on no parameter's value, or is written into an argument of it."""
    name = getattr(func, "__name__", "")
    if name.startswith("new_") or name.endswith("_like") or name == "__setitem__":
        return True
    return name.endswith("_") and not name.endswith("__")
