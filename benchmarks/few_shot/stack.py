"""Many gradient fits at once: the weights of F fits are one tensor with an axis of fits in front.

    weights (F, ...)     batches (F, m, d)     logits (F, m, C)     loss = sum of the fits' mean losses

AdamW and IVON act on each number by itself, so that one step of theirs on the stack is F steps of F fits that know
nothing of each other (IVON's with noise of their own). What a step costs is mostly the calls, which are made once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from benchmarks.few_shot.problem import BATCH_SIZE, Case, Watch
from kngd_ray.training.batches import BatchSampler, Support

_TIMED = 30  # steps


class Stack:
    """F copies of a module with weights of their own.

    Args:
        module: maps (m, d) features to (m, C) logits.
        parameters: trainable tensors of each fit, by name in the module.
        constants: other tensors of each fit, by name in the module.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[Mapping[str, Tensor]],
        constants: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        self.module = module
        self.parameters = {name: stack.requires_grad_() for name, stack in _stacked(parameters).items()}
        self.constants = _stacked(constants)

    def logits(self, features: Tensor) -> Tensor:
        """(F, m, C) of (F, m, d)."""

        def one(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
            logits: Tensor = functional_call(self.module, tensors, (x,))
            return logits

        return vmap(one)({**self.parameters, **self.constants}, features)

    def of(self, f: int, features: Tensor) -> Tensor:
        """(m, C) logits of one fit."""
        tensors = {name: stack[f].detach() for name, stack in {**self.parameters, **self.constants}.items()}
        with torch.no_grad():
            logits: Tensor = functional_call(self.module, tensors, (features,))
        return logits


def _stacked(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name].detach() for state in states]) for name in (states[0] if states else ())}


class Batches:
    """The batches that the package's own fits of the cases would see, side by side.

    Folds of a cross-validation differ by a few shots: the smaller batch is filled up with samples of weight 0, and
    where one fold would have a batch more than another, its last shots are left out.

    Args:
        cases: F support sets.
        epochs: passes over them.
    """

    def __init__(self, cases: Sequence[Case], epochs: int) -> None:
        per_epoch = min(-(-len(case.support) // BATCH_SIZE) for case in cases)
        supports = [case.support.subset(torch.arange(min(len(case.support), per_epoch * BATCH_SIZE))) for case in cases]
        self.steps = per_epoch * epochs
        self._samplers = [
            BatchSampler(support, BATCH_SIZE, epochs, case.seed) for support, case in zip(supports, cases, strict=True)
        ]
        longest = max(len(support) for support in supports)
        self._views = torch.stack([_padded(_views(support), longest) for support in supports])
        self._labels = torch.stack([_padded(support.labels, longest) for support in supports])
        self._fit = torch.arange(len(cases)).unsqueeze(1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features (F, m, d), labels (F, m), and weights (F, m) that add up to 1 in each fit."""
        for step in range(self.steps):
            chosen = [sampler.chosen(step) for sampler in self._samplers]
            picked, view = [one.local for one in chosen], chosen[0].turn % self._views.shape[2]
            longest = max(map(len, picked))
            at = torch.stack([_padded(p, longest) for p in picked])
            weight = torch.stack([_padded(torch.full((len(p),), 1 / len(p)), longest) for p in picked])
            yield self._views[self._fit, at, view], self._labels[self._fit, at], weight


def _views(shots: Support) -> Tensor:
    """(N, V + 1, d): another one is seen in each epoch, first the pictures as they are."""
    return torch.stack([shots.view(number).features for number in range(shots.views)], 1)


def _padded(tensor: Tensor, length: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


Around = Callable[[], AbstractContextManager[Any]]


def descend(
    stack: Stack,
    cases: Sequence[Case],
    epochs: int,
    optimizer: torch.optim.Optimizer,
    *,
    around: Around = nullcontext,
    watch: Watch | None = None,
    at_most: int | None = None,
) -> list[float]:
    """Minimise the cross-entropy of a stack of fits.

    Args:
        stack: the fits.
        cases: what each is fitted to.
        epochs: passes over the shots.
        optimizer: of the stack's parameters.
        around: what a gradient is taken in, such as sampled weights.
        watch: follows the test accuracy.
        at_most: steps after which to stop.

    Returns:
        Seconds of each step.
    """
    seconds = []
    if watch is not None:
        _see(stack, watch, 0)
    for step, (features, labels, weight) in enumerate(Batches(cases, epochs), 1):
        start = perf_counter()
        with around():
            optimizer.zero_grad()
            logits = stack.logits(features)
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            (loss * weight.flatten()).sum().backward()
        optimizer.step()
        seconds.append(perf_counter() - start)
        if watch is not None and watch.due(step):
            _see(stack, watch, step)
        if step == at_most:
            break
    return seconds


def _see(stack: Stack, watch: Watch, step: int) -> None:
    with torch.no_grad():
        watch.see(step, stack.logits(watch.features))


def adamw(stack: Stack, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW of all fits."""
    return torch.optim.AdamW(list(stack.parameters.values()), lr=lr, weight_decay=weight_decay, fused=True)


def timed(cases: Sequence[Case], run: Callable[[Sequence[Case], int, int], list[float]]) -> float:
    """Median seconds of a step of a fit that runs alone.

    Args:
        cases: of which the first is fitted.
        run: fits cases for a number of epochs and of steps at most, and returns the seconds of each step.

    Returns:
        Seconds.
    """
    return median(run(cases[:1], _TIMED, _TIMED)[_TIMED // 6 :] or [float("nan")])
