"""Jacobian rows of a head by ``torch.func``: the general form, which any module has.

A row of H is the gradient of one observed scalar with respect to all trainable parameters,
flattened in the order of ``named_parameters()``.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_map

# A batch as a network takes it: one tensor, or several by name, samples in dimension 0.
Inputs = Tensor | Mapping[str, Tensor]

_NUMBERS = 1 << 24  # numbers of rows that one chunk of samples forms at once, 64 MB in float32


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a filter's belief is about.

    Args:
        module: any module.

    Returns:
        Parameters that require a gradient, by name, in registration order.
    """
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Concatenate tensors into one vector.

    Args:
        tensors: parameters by name.

    Returns:
        (n,) their entries in the mapping's order.
    """
    return torch.cat([t.detach().reshape(-1) for t in tensors.values()])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`flatten`.

    Args:
        vector: (n,) entries.
        like: tensors that give names and shapes.

    Returns:
        Views of the vector by name.
    """
    pieces = vector.split([t.numel() for t in like.values()])
    return {name: piece.view_as(t) for (name, t), piece in zip(like.items(), pieces, strict=True)}


def jacobian_rows(
    head: nn.Module,
    inputs: Inputs,
    cotangent: Tensor,
    names: Collection[str] | None = None,
    theta: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Rows ``V_ij J_i`` of H for every sample i and observation j, a chunk of samples at a time.

    What ``torch.func`` cannot transform, such as a LayerNorm of 16 bits, is differentiated a row at a time.

    Args:
        head: maps (m, ...) inputs, a tensor or several by name, to (m, C) outputs, samples independent of one another.
        inputs: (m, ...) one batch.
        cotangent: (m, k, C) derivative of each observation with respect to the outputs.
        names: trainable parameters whose columns are wanted; None is all.
        theta: trainable weights by name, at which the rows are taken; None is the head's own.

    Returns:
        (m * k, size) rows by parameter, the k rows of a sample together.

    Raises:
        RuntimeError: a row alone does not fit into memory, or `theta` goes through what torch.func cannot transform.
    """
    weights = theta or {name: p.detach() for name, p in trainable(head).items()}
    parameters = {name: p for name, p in weights.items() if names is None or name in names}
    m, k, _ = cotangent.shape
    if m == 0:
        return {name: p.new_zeros(0, p.numel()) for name, p in parameters.items()}

    def rows_of(x: Inputs, v: Tensor) -> dict[str, Tensor]:
        def outputs(theta: dict[str, Tensor]) -> Tensor:
            out: Tensor = functional_call(head, {**weights, **theta}, (tree_map(lambda t: t.unsqueeze(0), x),))
            return out.squeeze(0)

        pull = vjp(outputs, parameters)[1]
        (rows,) = vmap(pull)(v)
        return rows

    chunk = max(1, _NUMBERS // (k * sum(p.numel() for p in parameters.values())))
    try:
        with torch.no_grad():  # of the parameters that are not wanted
            rows = vmap(rows_of, chunk_size=chunk)(inputs, cotangent)
    except RuntimeError as error:
        # under a transformation of the caller's there is no graph
        if theta is not None or isinstance(error, torch.OutOfMemoryError):
            raise
        rows = _one_by_one(head, inputs, cotangent, list(parameters))
    return {name: rows[name].reshape(m * k, -1) for name in parameters}


def _one_by_one(head: nn.Module, inputs: Inputs, cotangent: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The same of the head's own weights, by a forward pass of each sample and a backward pass of each row."""
    parameters = trainable(head)
    own = [parameters[name] for name in names]
    m, k, _ = cotangent.shape
    found = {name: p.new_zeros(m, k, p.numel()) for name, p in zip(names, own, strict=True)}
    for i in range(m):
        with torch.enable_grad():
            output = head(tree_map(lambda x, i=i: x[i : i + 1].detach(), inputs)).squeeze(0)
        for j in range(k):
            gradients = torch.autograd.grad(output, own, cotangent[i, j], retain_graph=j < k - 1, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    found[name][i, j] = gradient.flatten()
    return found
