"""What a batch says about the weights: observation models and noise, from a forward pass to whitened rows of H."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from kngd_ray.clip import CLIPHead, CLIPNetwork, Head, tower_products
from kngd_ray.filters import GateResiduals, Layer, NoGate, NoiseModel, Seen, Whitening
from kngd_ray.observations import Linearisation, Linearizer, Observation, stack, trainable
from kngd_ray.sharding import Group, Observed, StreamedOutcome
from kngd_ray.training.batches import Batch, seeded
from kngd_ray.training.options import FitOptions

_EXAMPLES = 8  # inputs to find out on how the head is linearised
_DRAWS = 1  # stream of the observation models' random numbers, apart from the sampler's


@dataclass(frozen=True)
class BatchSeen:
    """A global batch as observed at one value of the weights.

    Attributes:
        logits: (m, C) of the local samples.
        observed: what the filter conditions on.
        whitening: of all s samples, in rank order.
        nu: (s, k) innovations before whitening.
        base: (s, k) noise variances known from the likelihood.
        channel: (s, k) channels of the noise.
        plain: (M,) whitened innovations of the global batch where it was linearised.
        cost: gives the energy.
    """

    logits: Tensor
    observed: Observed
    whitening: Whitening
    nu: Tensor
    base: Tensor
    channel: Tensor
    plain: Tensor
    cost: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def energy(self) -> Tensor:
        """The cost of the data there, a scalar of the local samples in float64.

        Half the squares of whitened residuals, and negative log-likelihoods over their noise. Only steps that are tried
        at several points ask for it.
        """
        return self.cost()


class Observer:
    """Observes batches by the models that the options name.

    Args:
        head: maps inputs of m samples to (m, C) logits, or to these and the pairs of a batch beside them.
        options: observation models and noise.
        seed: of the random numbers that sampling observation models use.
        group: the ranks that observe together.
    """

    def __init__(self, head: Head, options: FitOptions, seed: int, group: Group) -> None:
        self._models = options.observation
        self.noise_model = options.noise.observation
        self._logit_scale = head.logit_scale
        self._classes = len(head.class_embeddings)
        self._seed = seed
        self._group = group
        self._like = head.class_embeddings
        self._towers = isinstance(head, CLIPNetwork)
        self._head = head
        self._linear = options.at_mode and isinstance(head, CLIPHead)
        self._rows = [model.rows(self._classes) for model in self._models]
        residual = [model.residual for model, k in zip(self._models, self._rows, strict=True) for _ in range(k)]
        self.per_sample = sum(self._rows)
        self._residual = torch.tensor(residual, device=head.class_embeddings.device)
        self._gated = not isinstance(options.filter.gate, NoGate)
        # Each of E passes over the same shots counts 1/E: together they are as much evidence as the shots are.
        self._passes = max(options.epochs, 1) if options.noise.tempering == "passes" else 1

    @cached_property
    def linearizer(self) -> Linearizer:
        """Of the head, tried out on first use: a fit that ends at the mode never uses it."""
        return Linearizer(self._head, self._head.example(_EXAMPLES))

    @cached_property
    def layers(self) -> list[Layer]:
        """The head's parameters as the filter sees them."""
        if not self._linear:
            return self.linearizer.layers
        # a class residual's one matrix multiplies inputs, as no pass needs to tell
        return [Layer(name, len(w), w.shape[1], factored=True) for name, w in trainable(self._head).items()]

    @property
    def r0(self) -> float:
        """Noise variance of the first model's rows, tempered."""
        return self._models[0].r0 * self._passes

    def initial_noise(self, like: Tensor) -> Tensor:
        """The noise state before the first step, of the dtype and device of `like`."""
        likelihood = [float("nan") if model.likelihood is None else model.likelihood for model in self._models]
        r0 = like.new_tensor([model.r0 for model in self._models])
        return self.noise_model.init(r0, like.new_tensor(likelihood), self._rows, self._classes)

    def observe(self, batch: Batch, noise: Tensor, displaced: Tensor | None = None) -> BatchSeen:
        """Observe a batch at the head's weights.

        Args:
            batch: this rank's part of the global batch.
            noise: the noise state.
            displaced: (n,) mu- less the weights, where these are not the predicted mean: the linear model at mu- then
                gives the innovations.

        Returns:
            What was seen.
        """
        return self.look(self.linearizer.run(batch.inputs), batch, self.uniforms(batch), noise, displaced)

    def look(
        self,
        passed: Linearisation,
        batch: Batch,
        uniforms: Sequence[Tensor],
        noise: Tensor,
        displaced: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> BatchSeen:
        """Observe a batch where it was linearised: a function of tensors.

        Args:
            passed: the forward pass of the batch.
            batch: this rank's part of the global batch.
            uniforms: random numbers of each model, of :meth:`uniforms`.
            noise: the noise state.
            displaced: as in :meth:`observe`.
            offset: (m, C) from the local logits to the logits by weights that have not seen the sample.

        Returns:
            What was seen.
        """
        outputs = passed.logits
        if offset is not None:
            outputs = outputs + pad(offset.to(outputs), (0, outputs.shape[1] - self._classes))
        observations = self._observations(outputs, batch, uniforms)
        local = stack(observations, self.noise_model.channels(self._classes))
        nu, base, channel, *form = self._gather(local, observations, batch)
        channel = channel.long()
        R = self.noise_model.covariance(noise, base, channel) * self._passes
        whitening = Whitening(R)
        own = whitening if self._group.world_size == 1 else Whitening(R[batch.own])
        with tower_products(self._like.device) if self._towers else nullcontext():
            H = passed.jacobian(own.rows(local.cotangent))
        whitened = whitening.innovations(nu)
        residuals = self._gate_residuals(whitened, R, *form) if self._gated else None
        cost = partial(self._energy, passed.logits, batch, whitened[batch.own], R[batch.own])
        whitened = plain = whitened.flatten()
        if displaced is not None:
            pieces = displaced.split([layer.size for layer in self.layers])
            shift = torch.stack([H[x.name].times(v) for x, v in zip(self.layers, pieces, strict=True)]).sum(0)
            shift = self._group.gather_rows(shift.view(-1, nu.shape[1]), batch.sizes).flatten()
            whitened, residuals = whitened - shift, residuals and residuals.shifted(shift)
        observed = Observed(
            H,
            whitened,
            residuals,
            batch.sizes,
            nu.shape[1],
            1.0 / self._passes,
            self.seed_of_signs(batch),
            held_out=offset is not None,
        )
        logits = passed.logits[:, : self._classes]
        return BatchSeen(logits, observed, whitening, nu, base, channel, plain, cost)

    def _energy(self, outputs: Tensor, batch: Batch, whitened: Tensor, R: Tensor) -> Tensor:
        """The cost of the local samples: outputs (m, D), whitened innovations (m, k), noise (m, k) or (m, k, k)."""
        variances = R if R.dim() == 2 else R.diagonal(dim1=1, dim2=2)
        logits, row = outputs[:, : self._classes], 0
        found = outputs.new_zeros((), dtype=torch.float64)
        for model, k in zip(self._models, self._rows, strict=True):
            loss = model.loss(logits, batch.labels)
            if loss is None:
                found = found + 0.5 * whitened[:, row : row + k].double().square().sum()
            else:
                found = found + (loss.double() / variances[:, row].double()).sum()
            row += k
        return found

    def learned(
        self, noise: Tensor, seen: BatchSeen, outcome: StreamedOutcome, model: NoiseModel | None = None
    ) -> Tensor:
        """The noise state after an update: estimated from residuals, less those that were gated.

        Args:
            noise: the noise state before.
            seen: what was seen.
            outcome: the update.
            model: how it is estimated; None follows the options.

        Returns:
            The noise state.
        """
        if not self.noise_model.learns:
            return noise
        kept = (outcome.weight >= 1).view(seen.nu.shape) & self._residual
        predicted = seen.whitening.restored(outcome.predicted.to(seen.nu.dtype))
        batch = Seen(seen.nu, predicted, seen.base, seen.channel, kept.to(seen.nu))
        return (model or self.noise_model).update(noise, batch).to(noise.dtype)

    def seed_of_signs(self, batch: Batch) -> int:
        """The seed of the signs that a covariance family draws for a batch."""
        return self._seed * 1_000_003 + batch.step

    def uniforms(self, batch: Batch) -> list[Tensor]:
        """Random numbers of each model, drawn for the global batch and cut: the ranks see what one process would.

        Args:
            batch: this rank's part of the global batch.

        Returns:
            For each model (m, draws) numbers in [0, 1), of the class embeddings' dtype and device.
        """
        return [self._uniforms(number, batch) for number in range(len(self._models))]

    def _observations(self, outputs: Tensor, batch: Batch, uniforms: Sequence[Tensor]) -> list[Observation]:
        """What each model sees of the local outputs (m, D): the logits, then the pairs for models that ask."""
        logits = outputs[:, : self._classes]
        seen = []
        for model, u in zip(self._models, uniforms, strict=True):
            if model.pairs:
                everyone = self._group.gather_rows(outputs, batch.sizes)
                labels = self._group.gather_rows(batch.labels, batch.sizes)
                seen.append(model.observe_pairs(everyone, labels, self._logit_scale, batch.own, self._classes))
            else:
                one = model.observe(logits, batch.labels, self._logit_scale, u)
                more = outputs.shape[1] - self._classes
                seen.append(replace(one, cotangent=pad(one.cotangent, (0, more))) if more else one)
        return seen

    def _uniforms(self, number: int, batch: Batch) -> Tensor:
        draws = self._models[number].draws(self._classes)
        like = self._like
        if draws == 0:
            return like.new_empty(len(batch.labels), 0)
        generator = seeded(self._seed, batch.step, _DRAWS, number)
        drawn = torch.rand((batch.total, draws), generator=generator, dtype=torch.float64)
        return drawn[batch.own].to(like)

    def _gather(self, local: Observation, observations: list[Observation], batch: Batch) -> list[Tensor]:
        """Innovations, base noise, channels, and for a gate its residuals and scales: (s, k) each, of all samples."""
        columns = [local.innovation, local.base_noise, local.channel]
        if self._gated:
            columns += torch.cat([o.gate_residuals for o in observations], 1).unbind(2)
        if self._group.world_size == 1:
            return columns
        # One gather for a few small matrices; float64 holds channel numbers and float32 exactly.
        packed = torch.stack([column.double() for column in columns], 2)
        gathered = self._group.gather_rows(packed, batch.sizes).unbind(2)
        return [column.to(mine.dtype) for column, mine in zip(gathered, columns, strict=True)]

    def _gate_residuals(self, whitened: Tensor, R: Tensor, nu: Tensor, factor: Tensor) -> GateResiduals:
        """Residuals as they are, without the tempering of their noise; for the others nu and factor (s, k) instead."""
        tempering = self._passes**0.5
        deviation = (R if R.dim() == 2 else R.diagonal(dim1=1, dim2=2)).double().sqrt()
        return GateResiduals(
            torch.where(self._residual, tempering * whitened.double(), nu).flatten(),
            torch.where(self._residual, tempering, factor * deviation).flatten(),
        )
