"""The extended Kalman filter, iterated: a batch is linearised again at its own result."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kngd_ray.filters import Belief, Covariance, NoGate
from kngd_ray.filters.functional_mode import eager
from kngd_ray.sharding import ShardedUpdate, StreamedOutcome
from kngd_ray.training.batches import Batch
from kngd_ray.training.observing import BatchSeen
from kngd_ray.training.posterior import InMemoryPosterior, Update

_ROUNDED = 1e-9  # of the objective, within which a step counts as one that does not raise it


class IteratedEKF(InMemoryPosterior):
    """A belief over any head, conditioned on rows of its Jacobian.

    Args:
        head: as of :class:`~kngd_ray.training.posterior.Posterior`.
        options: likewise.
        observer: likewise.
        filter: likewise.
    """

    def conditioned(self, predicted: Belief, batch: Batch) -> Update:
        """Observe a batch once for each linearisation."""

        def observe(mu: Tensor, displaced: Tensor | None) -> BatchSeen:
            if mu is not self.belief.mu:
                self.write(mu)
            return self.observer.observe(batch, self.noise, displaced)

        return self.condition(predicted, observe, partial(self.observer.learned, self.noise))

    def condition(
        self,
        predicted: Belief,
        observe: Callable[[Tensor, Tensor | None], BatchSeen],
        learn: Callable[[BatchSeen, StreamedOutcome], Tensor],
    ) -> Update:
        """Condition on a batch, relinearised at its own result as often as is asked for: a function of tensors.

        An iterated EKF whose steps are halved until the objective, ``|mu - mu-|^2 / 2`` in the norm of P-^-1 plus what
        the data cost, does not rise. Every point is a mixture of updates P- H^T w, so its norm takes only products of M
        numbers.

        Args:
            predicted: the belief before.
            observe: the batch at weights (n,), and the predicted mean less these weights; None where they are equal.
            learn: the noise state after the batch, from what was seen at the predicted mean and the update there.

        Returns:
            What the batch made of the belief.
        """
        first = observe(predicted.mu, None)
        outcome = first_outcome = self.filter.update(predicted, first.observed)
        options = self.options.filter
        if options.iterations == 1:
            return Update.of(outcome.belief, learn(first, first_outcome), first, first_outcome)
        if outcome.weights is None or not isinstance(options.gate, NoGate):
            # in runs, or gated, there is no objective to compare points by
            for _ in range(options.iterations - 1):
                seen = observe(outcome.belief.mu, predicted.mu - outcome.belief.mu)
                outcome = self.filter.update(predicted, seen.observed)
            return Update.of(outcome.belief, learn(first, first_outcome), first, first_outcome)
        mu, distance, cost = predicted.mu, first.energy.new_zeros(()), self.group.sum(first.energy)
        aim = _Aim.of(outcome, first)
        size: Any = 1.0 if eager() else torch.ones_like(distance)
        logits = first.logits
        going = torch.ones_like(distance, dtype=torch.bool)
        for _ in range(options.iterations):
            share = size if eager() else size.to(mu)
            there, far = mu.lerp(outcome.belief.mu, share), aim.distance(distance, size)
            seen = observe(there, predicted.mu - there)
            total = far / 2 + self.group.sum(seen.energy)
            falls = total <= cost + _ROUNDED * cost.abs()
            if eager():
                fell, finite = torch.stack([falls, total.isfinite()]).tolist()
                if finite and not fell:
                    size = size / 2
                    continue
            # what is not finite is refused here
            new = self.filter.update(predicted, seen.observed)
            moved = ((seen.logits - logits).abs() > options.tolerance).any()
            if eager():
                mu, distance, cost, outcome, aim, logits = there, far, total, new, _Aim.of(new, seen), seen.logits
                if not bool(self.group.sum(moved.double())) and size == 1.0:
                    break
                size = 1.0
            else:  # of many trials each goes its own way, and as far as it would alone
                falls = falls & going
                going = going & ~(falls & ~moved & (size == 1.0))
                keep = partial(_either, falls)
                logits = keep(seen.logits, logits)
                mu, distance, cost = keep(there, mu), keep(far, distance), keep(total, cost)
                aim = _Aim(*map(keep, _Aim.of(new, seen), aim))
                belief = Belief(keep(new.belief.mu, outcome.belief.mu), _either_of(falls, new, outcome))
                outcome = replace(new, belief=belief)
                size = torch.where(falls, torch.ones_like(size), size / 2)
        return Update.of(Belief(mu, outcome.belief.covariance), learn(first, first_outcome), first, first_outcome)


class _Aim(NamedTuple):
    """Where an update goes from the point of its linearisation, in the norm of P-^-1 around the predicted mean."""

    whole: Tensor  # squared distance of the updated mean
    across: Tensor  # its product with the point that it was linearised at

    @classmethod
    def of(cls, update: ShardedUpdate, seen: BatchSeen) -> "_Aim":
        """From w = S^-1 nu: mu - mu- = P- H^T w, and H P- H^T w = nu - w, where nu is of the linear model at mu-."""
        assert update.weights is not None
        w, nu = update.weights.double(), seen.observed.nu.double()
        return cls(w @ (nu - w), w @ (nu - seen.plain.double()))

    def distance(self, here: Tensor, size: Any) -> Tensor:
        """Squared distance after a part of the step, from the squared distance at its start."""
        return (1 - size) ** 2 * here + 2 * size * (1 - size) * self.across + size**2 * self.whole


def _either(first: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new tensor where a condition holds, else the old one."""
    return torch.where(first, new, old)


def _either_of(first: Tensor, new: ShardedUpdate, old: ShardedUpdate) -> Covariance:
    """The covariance of the new update where a condition holds, else of the old one."""
    before = old.belief.covariance
    return {
        name: {key: torch.where(first, value, before[name][key]) for key, value in state.items()}
        for name, state in new.belief.covariance.items()
    }
