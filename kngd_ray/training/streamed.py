"""A belief over whole towers: the same filter, a layer at a time and in place.

A tower has so many weights that a second copy of theta or P does not fit. So theta is one flat buffer of which the
network's parameters are views, and :class:`~kngd_ray.sharding.StreamedFilter` writes into it and into P. Beside the
activations and their derivatives a step holds n numbers of theta, the rank's share of P, and one layer's rows of H.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kngd_ray.clip import CLIPNetwork, Head
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Family, Layerwise, PerLayer, Transition
from kngd_ray.observations import flatten, trainable
from kngd_ray.sharding import Group, StreamedFilter
from kngd_ray.training.batches import Batch
from kngd_ray.training.gradient import wider
from kngd_ray.training.method import batch_scores
from kngd_ray.training.observing import BatchSeen, Observer
from kngd_ray.training.options import FitOptions
from kngd_ray.training.posterior import Posterior, Update

TOWERS = "clip."  # where a network has its towers' weights
ADAPTERS = "head."  # and its adapters'
TOWERS_BY = "prior/towers"
HELD_OUT = "start/held_out"
_LEAST = 1e-6  # mean square of a layer's weights, of which some start at 0


def family_of(head: Head, options: FitOptions) -> Family:
    """The covariance family of a fit: adapters that were fitted before the towers keep that fit's Kronecker factors.

    Args:
        head: of the fit.
        options: likewise.

    Returns:
        The family that the options name, with Kronecker factors for such adapters.
    """
    family = options.filter.covariance
    if not isinstance(head, CLIPNetwork) or not head.started or not isinstance(family, Layerwise):
        return family
    return PerLayer(family, (ADAPTERS,))


def check_activations(head: Head, options: FitOptions) -> None:
    """Refuse towers whose activations are not finite: how towers are linearised is found out by comparing numbers.

    Args:
        head: before the first step.
        options: of the fit.

    Raises:
        FilterError: activations are not finite.
    """
    with torch.no_grad():
        sound = bool(torch.isfinite(head(head.example(1))).all())
    if not sound:
        raise FilterError(
            "the towers' activations are NaN or infinite before the first step: look at the weights that "
            f"model.pretrained or prior names{wider(options.tune)}."
        )


class StreamedPosterior(Posterior):
    """A belief over a network too large to be copied.

    A step conditions on the whole batch once; ``filter.serial`` and ``filter.iterations`` need copies of the belief.

    Args:
        head: as of :class:`~kngd_ray.training.posterior.Posterior`.
        options: likewise.
        observer: likewise.
        filter: likewise.
    """

    filter: StreamedFilter
    held_out: Tensor | None = None  # (N, C) logits of the shots by heads that have not seen them, less the head's
    towers_by: float | None = None  # factor of the towers' prior variance, as shots chose it

    @classmethod
    def of(cls, head: Head, options: FitOptions, observer: Observer, group: Group) -> "StreamedPosterior":
        """The prior of a network, in units of its towers' own weights."""
        prior, family = options.filter, family_of(head, options)
        started = isinstance(head, CLIPNetwork) and bool(head.started)
        settled = [layer.name for layer in observer.layers if started and layer.name.startswith(ADAPTERS)]
        units = _units(head, options)
        return cls(head, options, observer, StreamedFilter(family, observer.layers, group, prior.gate, units, settled))

    def kept(self, transition: Transition) -> dict[str, Tensor]:
        """Noise, the factor of the towers' prior, and what heads say of shots that they have not seen."""
        by = {} if self.towers_by is None else {TOWERS_BY: torch.tensor(self.towers_by, dtype=torch.float64)}
        of_start = {} if self.held_out is None else {HELD_OUT: self.held_out}
        return super().kept(transition) | by | of_start

    def _restore(self, kept: Mapping[str, Tensor]) -> None:
        super()._restore(kept)
        if TOWERS_BY in kept:
            self.widen_towers(float(kept[TOWERS_BY]))
        known = kept.get(HELD_OUT)
        self.held_out = None if known is None else known.to(self.belief.mu.device)

    def unsettle(self) -> None:
        """Let adapters learn as everything else does: what is to be observed is not what they were fitted on."""
        self.filter.unsettle()

    @property
    def of_towers(self) -> list[str]:
        """Names of the towers' layers."""
        return [layer.name for layer in self.observer.layers if layer.name.startswith(TOWERS)]

    def widen_towers(self, factor: float) -> None:
        """Make the towers' prior wider by a factor, before the first step."""
        self.towers_by = factor
        self.filter.rescale(self.belief, set(self.of_towers), factor, self.options.filter.weight_variance)

    def _prior(self) -> Belief:
        mu, p0 = flatten(self.parameters), self.options.filter.weight_variance
        sizes = [p.numel() for p in self.parameters.values()]
        for p, piece in zip(self.parameters.values(), mu.split(sizes), strict=True):
            p.data = piece.view_as(p)
        # mu_0 is a third copy of theta: only a process that returns to it has to pay for it
        returns = self.options.noise.process.transition(0, p0).decay != 1.0
        self.anchor = mu.clone() if returns else mu
        return self.filter.init(mu, p0)

    def keep(self, transition: Transition) -> Tensor | None:
        """The mean, where a pull on it is written before the step can be refused."""
        return self.belief.mu.clone() if transition.decay != 1.0 else None

    def undo(self, kept: Tensor | None) -> None:
        """Write it, if it was moved."""
        if kept is not None:
            self.belief.mu.copy_(kept)

    def advance(self, batch: Batch, transition: Transition) -> Update:
        """Predict and condition in place, in one pass over the layers for S and one for mean and covariance."""
        self.filter.predict_mean(self.belief, transition, self.anchor)
        passed, offset = self.observer.linearizer.run(batch.inputs), self._offset(batch)
        seen = self.observer.look(passed, batch, self.observer.uniforms(batch), self.noise, offset=offset)
        self._refuse(seen)
        outcome = self.filter.update(self.belief, transition, seen.observed)
        self.noise = self.observer.learned(self.noise, seen, outcome)
        unlearned = self.group.sum(seen.nu.new_full((), len(outcome.unlearned), dtype=torch.float64))
        update = replace(Update.of(self.belief, self.noise, seen, outcome), unlearned=unlearned)
        if not batch.scored:
            return update
        # the variance of all C logits would take C backward passes: labels are predicted by the mean alone
        logits = seen.logits if offset is None else seen.logits + offset.to(seen.logits)  # the head has seen them
        nll = batch_scores(logits, batch, self.group)["nll"]
        return replace(update, log_predictive=(-nll * batch.total,))

    def _offset(self, batch: Batch) -> Tensor | None:
        """(m, C) from the local logits to the logits of a head without the sample, where that is known."""
        if self.held_out is None or batch.shots is None or not self.filter.settled:
            return None
        return self.held_out[batch.shots.to(self.held_out.device)]

    def _mean(self) -> Tensor:
        return self.belief.mu  # of which the parameters are views

    @property
    def _narrower(self) -> str:
        """The setting that makes the towers' prior narrower."""
        if self.options.filter.tower_logit_variance is not None:
            return "tower_logit_variance"
        return "p0" if self.options.tune.parameters == "lora" else "towers"

    def _refuse(self, seen: BatchSeen) -> None:
        """Tell of activations before the passes over the layers; every rank sees the innovations of all.

        Raises:
            FilterError: some are not finite.
        """
        if bool(torch.isfinite(seen.nu).all()):
            return
        bad, tune = int((~torch.isfinite(seen.nu)).sum()), self.options.tune
        raise FilterError(
            f"{bad} of {seen.nu.numel()} innovations are NaN or infinite, as the towers' activations are: the step was "
            f"refused and the belief kept; lower filter.{self._narrower}{wider(tune)}."
        )


def _units(head: Head, options: FitOptions) -> dict[str, float]:
    """Prior variances of the towers' layers in units of the adapters': in proportion to the mean square of weights.

    A normalisation's shifting weights take the mean square of its scaling ones: they act on the same outputs. LoRA's
    factors B start at 0, and are the unit; its A go by their own mean square where a logit's variance is given, else
    they are as B.
    """
    prior, towers = options.filter, {n: p for n, p in trainable(head).items() if n.startswith(TOWERS)}
    relative = prior.tower_logit_variance is not None
    if options.tune.parameters == "lora" and not relative:
        return {}
    share = 1.0 if relative else prior.towers / prior.weight_variance
    found = {}
    for name, p in towers.items():
        like = p
        if options.tune.parameters == "norm" and name.endswith(".bias"):
            like = towers.get(f"{name.removesuffix('bias')}weight", p)
        up = options.tune.parameters == "lora" and name.endswith(".up")
        found[name] = share * (1.0 if up else max(float(like.detach().square().mean()), _LEAST))
    return found
