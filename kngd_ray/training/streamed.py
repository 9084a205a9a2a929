"""The Kalman filter over whole towers: the same filter, a layer at a time and in place.

A tower has so many weights that a second copy of theta or P is what does not fit. So theta is one flat buffer of which
the network's parameters are views, and :class:`~kngd_ray.sharding.StreamedFilter` writes into it and into P. Beside the
activations and their derivatives a step holds n numbers of theta, the rank's share of P, and one layer's rows of H.
"""

import torch
from torch import Tensor

from kngd_ray.clip import Head
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Transition
from kngd_ray.observations import flatten
from kngd_ray.sharding import Group, StreamedFilter
from kngd_ray.training.batches import Batch
from kngd_ray.training.gradient import wider
from kngd_ray.training.kalman import Conditioned, KalmanNGD, nested
from kngd_ray.training.method import MethodState, batch_scores
from kngd_ray.training.observing import BatchSeen
from kngd_ray.training.options import FilterOptions, FitOptions

_TOWERS = "clip."  # where a network has its towers' weights
_LEAST = 1e-6  # mean square of a layer's weights, of which some start at 0


class StreamedKalmanNGD(KalmanNGD):
    """:class:`~kngd_ray.training.kalman.KalmanNGD` for networks too large to be copied.

    A step conditions on the whole batch once; ``filter.serial`` and ``filter.iterations`` need copies of the belief.
    """

    def __init__(self, head: Head, options: FitOptions, seed: int = 0, group: Group | None = None) -> None:
        # how a network is linearised is found out by comparing numbers, which says nothing of those that are none
        with torch.no_grad():
            sound = bool(torch.isfinite(head(head.example(1))).all())
        if not sound:
            raise FilterError(
                "the towers' activations are NaN or infinite before the first step: look at the weights that "
                f"model.pretrained or prior names{wider(options.tune)}."
            )
        super().__init__(head, options, seed, group)

    def _place(self, prior: FilterOptions) -> None:
        mu = flatten(self.parameters)
        for p, piece in zip(
            self.parameters.values(), mu.split([p.numel() for p in self.parameters.values()]), strict=True
        ):
            p.data = piece.view_as(p)
        self.streamed = StreamedFilter(self.family, self.observer.layers, self.group, prior.gate, self._units(prior))
        self.placed = self.streamed
        self.belief = self.streamed.init(mu, prior.weight_variance)
        # mu_0 is a third copy of theta: only a process that returns to it has to pay for it
        returns = self._options.noise.process.transition(0, prior.weight_variance).decay != 1.0
        self._anchor = mu.clone() if returns else mu

    def _units(self, prior: FilterOptions) -> dict[str, float]:
        """Prior variances of the towers' own weights in units of p0."""
        if self._options.tune.parameters != "full":
            return {}
        return {
            name: prior.towers * max(float(p.detach().square().mean()), _LEAST) / prior.weight_variance
            for name, p in self.parameters.items()
            if name.startswith(_TOWERS)
        }

    def _keep(self, transition: Transition) -> Tensor | None:
        # only a pull on the mean is written before the step can be refused
        return self.belief.mu.clone() if transition.decay != 1.0 else None

    def _undo(self, kept: Tensor | None) -> None:
        if kept is not None:
            self.belief.mu.copy_(kept)

    def _advance(self, batch: Batch, transition: Transition) -> tuple[Conditioned, tuple[float, ...] | None]:
        self.streamed.predict_mean(self.belief, transition, self._anchor)
        seen = self.observer.observe(batch, self.noise)
        self._refuse(seen)
        done = Conditioned(self.belief, seen, self.streamed.update(self.belief, transition, seen.observed))
        self.noise = self.observer.learned(self.noise, seen, done.outcome)
        # the variance of all C logits would take C backward passes: labels are predicted by the mean alone
        scores = (-batch_scores(seen.logits, batch, self.group)["nll"] * batch.total,) if batch.scored else None
        return done, scores

    def load(self, state: MethodState) -> None:
        """Continue from a state; its covariance is that of all parameters, on whatever ranks it was written."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state.weights[name])
        self.noise = state.replicated["noise"].to(self.noise)
        mu = self.belief.mu
        self.belief = Belief(mu, self.streamed.own(nested(state.covariance, mu)))

    def _refuse(self, seen: BatchSeen) -> None:
        """Tell of activations before the passes over the layers; every rank sees the innovations of all.

        Raises:
            FilterError: some are not finite.
        """
        if bool(torch.isfinite(seen.nu).all()):
            return
        bad, tune = int((~torch.isfinite(seen.nu)).sum()), self._options.tune
        raise FilterError(
            f"{bad} of {seen.nu.numel()} innovations are NaN or infinite, as the towers' activations are: the step was "
            f"refused and the belief kept; lower filter.{'towers' if tune.parameters == 'full' else 'p0'}"
            f"{wider(tune)}."
        )
