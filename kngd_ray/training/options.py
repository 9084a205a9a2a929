"""Options of a fit: what is trained, by which method, for how long. Plain data, validated where it is read."""

from dataclasses import dataclass, field, replace
from math import exp, isfinite
from typing import Literal

from kngd_ray._plugins import kinds
from kngd_ray.clip import TuneOptions
from kngd_ray.clip.adapters import AnyAdapter, ClassResidual, averages
from kngd_ray.filters import Categorical as LikelihoodNoise
from kngd_ray.filters import (
    CovarianceFamily,
    Diagonal,
    Fixed,
    GateModel,
    Kronecker,
    Layerwise,
    NoGate,
    NoiseModel,
    PriorMean,
    ProcessModel,
    RandomWalk,
    ZeroShot,
)
from kngd_ray.observations import Categorical, Cosine, LogLikelihood, Model
from kngd_ray.training.losses import CrossEntropy, Loss

_CAUTIOUS = 2.0  # standard deviations of a prior's logarithm
_P0 = 0.1
_BATCH = 32
_STREAM_BATCH = 16  # the fewer, the more was learned just before each


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """The prior belief.

    Attributes:
        covariance: covariance family.
        p0: prior variance of every weight around its initial value; of a tower's own weights, see `towers`. None is
            0.1, or what `logit_variance` asks for.
        logit_variance: prior variance of a logit around its mean over the shots, nats^2. `p0` then follows from it and
            the shots: the same on any CLIP, whatever its logit scale. None takes `p0`.
        logit_spread: standard deviation of log `logit_variance` under a log-normal prior: where fits go to their mode
            (``FitOptions.at_mode``) it is the median, and folds over the shots choose; other fits take the value two
            standard deviations below it. 0 keeps it.
        mean: how much of the zero-shot logits is believed a priori.
        towers: prior variance of a tower's own weights (``tune.parameters=full``) as a part of the mean square of their
            layer: 0.01 takes each to be off by a tenth of what is usual there. Process noise is in proportion.
        tower_logit_variance: prior variance, nats^2, that all trained weights of the towers together give a logit less
            its mean over classes, averaged over the shots. It means the same on any architecture, width and logit
            scale, and replaces `towers`, and `p0` for LoRA's factors. Weights share it in proportion to the mean square
            of their layer. At 0 the towers stay as they are; None states the prior in weights.
        gate: what is done about observations that the belief finds too surprising.
        serial: samples conditioned on at once within a batch, each run knowing the samples before it (so does the
            gate); 0 is all of them. The work of the exact diagonal and of the block-diagonal form grows with the square
            of it, so a large batch is cheaper in small runs.
        iterations: linearisations per step. 1 is the predicted mean's; more are made at new means (iterated EKF), at
            most as many besides that one, and a step that raises the objective is halved, which takes another. With a
            gate, or in runs (`serial`), nothing is halved, and that of the predicted mean is counted.
        tolerance: change of a logit in nats below which a step is at its mode, and is linearised no further.
    """

    covariance: CovarianceFamily = field(default_factory=Diagonal)
    p0: float | None = None
    logit_variance: float | None = None
    logit_spread: float = 0.0
    mean: PriorMean = field(default_factory=ZeroShot)
    towers: float = 0.01
    tower_logit_variance: float | None = None
    gate: GateModel = field(default_factory=NoGate)
    serial: int = 0
    iterations: int = 1
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.p0 is not None and not self.p0 > 0:
            raise ValueError(f"p0 is {self.p0}; a prior variance must be above 0")
        if self.p0 is not None and self.logit_variance is not None:
            raise ValueError(
                f"p0 is {self.p0} and logit_variance {self.logit_variance}: the prior's variance is given twice; leave "
                "out p0 (of weights) or logit_variance (of logits)"
            )
        if self.logit_variance is not None and not (isfinite(self.logit_variance) and self.logit_variance > 0):
            raise ValueError(f"logit_variance is {self.logit_variance}; a prior variance must be finite and above 0")
        if not self.logit_spread >= 0:
            raise ValueError(f"logit_spread is {self.logit_spread}; a standard deviation must be 0 or more")
        if self.logit_spread and self.logit_variance is None:
            raise ValueError("logit_spread needs logit_variance, the median of its prior; give both")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must be above 0 nats")
        if not self.towers > 0:
            raise ValueError(f"towers is {self.towers}; a prior variance must be above 0")
        wide = self.tower_logit_variance
        if wide is not None and not (isfinite(wide) and wide >= 0):
            raise ValueError(f"tower_logit_variance is {wide}; a prior variance must be finite and 0 or more")
        if self.serial < 0:
            raise ValueError(
                f"serial is {self.serial}; give how many samples to condition on at once, or 0 for a whole batch"
            )
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; a step linearises at least once")

    @property
    def cautious_variance(self) -> float | None:
        """Prior variance of a logit where shots cannot choose it: the lower end of what `logit_spread` allows."""
        return None if self.logit_variance is None else self.logit_variance * exp(-_CAUTIOUS * self.logit_spread)

    @property
    def weight_variance(self) -> float:
        """Prior variance of a weight as far as the options give it: `p0`, or where the shots will say it, 0.1."""
        return _P0 if self.p0 is None else self.p0


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Process and observation noise.

    Attributes:
        process: how the belief moves between steps.
        observation: how observation noise is estimated; it starts at each observation model's r0.
        tempering: ``passes`` multiplies R by the number of passes over the shots, so that all passes together count
            each shot once: on linear observations, the posterior then equals a single pass's. ``none`` counts a shot
            again each time that it is seen, which makes the posterior too narrow by as much.
    """

    process: ProcessModel = field(default_factory=RandomWalk)
    observation: NoiseModel = field(default_factory=Fixed)
    tempering: Literal["passes", "none"] = "passes"


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Options of the gradient baselines, ``adamw`` and ``sgd``.

    Attributes:
        lr: learning rate.
        weight_decay: decoupled for AdamW, L2 for SGD.
        momentum: of SGD.
        schedule: learning rate over the run.
        loss: what is minimised.
    """

    lr: float = 3e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: Literal["constant", "cosine"] = "constant"
    loss: Loss = field(default_factory=CrossEntropy)

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; a learning rate must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be 0 or more")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Everything that decides the outcome of a fit, next to its data and its seed.

    Attributes:
        method: the optimiser.
        epochs: passes over the support set.
        batch_size: global batch, all ranks together; 0 is all shots where fits go to their mode, else 32.
        tune: what is trained beside the adapters: nothing, LoRA in the towers, or the towers' own weights.
        adapter: adapters on the towers' embeddings, applied in this order.
        observation: observation models, their rows stacked.
        filter: prior belief, for ``kalman``.
        noise: process and observation noise, for ``kalman``.
        optimizer: learning rate and the like, for ``adamw`` and ``sgd``.
    """

    method: Literal["kalman", "adamw", "sgd"] = "kalman"
    epochs: int = 5
    batch_size: int = 32
    tune: TuneOptions = field(default_factory=TuneOptions)
    adapter: tuple[AnyAdapter, ...] = (ClassResidual(),)
    observation: tuple[Model, ...] = (LogLikelihood(), Cosine(r0=1.0))
    filter: FilterOptions = field(default_factory=FilterOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}; give 0 or more passes")
        if self.batch_size < 0:
            raise ValueError(f"batch_size is {self.batch_size}; give the size of a batch, or 0 for all shots")
        if not self.adapter and not self.tune.images:
            raise ValueError(f"adapter is empty; name at least one ({', '.join(kinds(AnyAdapter))})")
        if not self.observation:
            raise ValueError(f"observation is empty; name at least one ({', '.join(kinds(Model))})")
        apart = [adapter.kind for adapter in self.adapter if not averages(adapter)]
        if self.tune.alpha != 1 and apart:
            raise ValueError(
                f"tune.alpha is {self.tune.alpha}, an average with pretrained weights, and the adapter {apart[0]} has "
                "none to average with; set alpha=1, or take the linear or class_residual adapter"
            )
        self._check_towers()
        unlikely = all(model.likelihood is None for model in self.observation)
        if isinstance(self.noise.observation, LikelihoodNoise) and unlikely:
            raise ValueError(
                "noise.observation is categorical, but no observation has a likelihood that sets its noise; "
                "observe probability, log_likelihood or categorical, or use fixed or ema noise"
            )

    @property
    def pairs(self) -> bool:
        """Whether the method sees image-text pairs besides the class logits."""
        if self.method == "kalman":
            return any(model.pairs for model in self.observation)
        return self.optimizer.loss.pairs

    @property
    def batch(self) -> int:
        """Shots of a batch; 0 is all of them."""
        return self.batch_size or (0 if self.at_mode else _BATCH)

    @property
    def at_mode(self) -> bool:
        """Whether each step ends at the mode of a linear softmax classifier, which needs no rows of H."""
        model = self.observation[0]
        return (
            self.method == "kalman"
            and not self.tune.images
            and len(self.adapter) == len(self.observation) == 1
            and isinstance(self.adapter[0], ClassResidual)
            and (isinstance(model, LogLikelihood) or (isinstance(model, Categorical) and not model.samples))
            and isinstance(self.filter.covariance, Kronecker)
            and isinstance(self.filter.gate, NoGate)
            and isinstance(self.noise.observation, Fixed)
            and self.filter.iterations > 1
            and not self.filter.serial
        )

    @property
    def refits(self) -> bool:
        """Whether the head that towers start from is fitted again when they are trained.

        Not where they cannot have moved, nor where others than the trained ones are served (``tune.alpha``).
        """
        moves = self.filter.tower_logit_variance != 0 and self.epochs > 0
        return self.method == "kalman" and self.tune.after_head and self.tune.refit and moves and self.tune.alpha == 1

    @property
    def notes(self) -> list[str]:
        """What is to be said of options that mean something else than they seem to, in sentences."""
        prior = self.filter
        if self.method != "kalman" or self.at_mode or not prior.logit_spread:
            return []
        return [
            f"filter.logit_variance is taken as {prior.cautious_variance:.3g} nats^2, the cautious end of"
            f" {prior.logit_variance:g} with its spread, as only fits that go to their mode choose it by the shots:"
            " filter.logit_spread=0 takes it as it is"
        ]

    def _check_towers(self) -> None:
        """What only whole towers can do, and what they cannot.

        Raises:
            ValueError: they are asked for it.
        """
        if self.pairs and not self.tune.images:
            raise ValueError("clip_cite sees pairs of images and texts; set tune.parameters to lora, norm or full")
        if not self.tune.images and self.method == "kalman" and self.filter.tower_logit_variance is not None:
            raise ValueError(
                "filter.tower_logit_variance is for trained towers, but tune.parameters is adapter: leave it "
                "out, or set tune.parameters to lora, norm or full"
            )
        if self.tune.after_head and not self.adapter:
            raise ValueError(
                "tune.start is head, but adapter is empty: there is no head to fit first; name an adapter, or "
                "set tune.start=zero_shot"
            )
        if not self.tune.images or self.method != "kalman":
            return
        if not isinstance(self.filter.covariance, Layerwise):
            raise ValueError(
                f"filter.covariance is {self.filter.covariance.kind}; over towers (tune.parameters="
                f"{self.tune.parameters}) it can be diagonal, kronecker or block_diagonal"
            )
        if isinstance(self.filter.covariance, Kronecker) and self.filter.covariance.columns != "identity":
            raise ValueError(
                f"filter.covariance.columns is {self.filter.covariance.columns}, for which shots must be features; "
                "over towers leave it out"
            )
        if any(isinstance(adapter, ClassResidual) and adapter.centred for adapter in self.adapter):
            raise ValueError("class_residual is centred on frozen features; over towers leave centred out")
        if self.filter.logit_variance is not None or self.filter.mean != ZeroShot():
            raise ValueError(
                "filter.logit_variance and filter.mean are for adapters on frozen features; over towers leave them out"
            )
        for name, value, plain in (("serial", self.filter.serial, 0), ("iterations", self.filter.iterations, 1)):
            if value != plain:
                raise ValueError(f"filter.{name} is {value}; over towers a batch is conditioned on once: leave it out")
        if self.tune.checkpointing:
            raise ValueError("tune.checkpointing saves memory of the gradient methods; kalman keeps all layers' inputs")


def counted_once(options: FitOptions, views: int) -> FitOptions:
    """Options of a filter that observes several views of each picture at once.

    A crop says nothing about the labels that its picture does not say. What it says is which features of a picture do
    not matter to its label. So the noise of each view is multiplied by the number of views, and the posterior is as
    wide as from the pictures alone.

    Args:
        options: as they were given.
        views: of each picture.

    Returns:
        The options, under which all views of a picture count as one observation.
    """
    return replace(options, observation=tuple(replace(model, r0=views * model.r0) for model in options.observation))


def streamed(options: FitOptions) -> FitOptions:
    """Options of a fit of a stream, whose length is unknown.

    Args:
        options: as they were given.

    Returns:
        The options; where the batch size is left open, it is not all of the stream, and a learning rate stays as it is.
    """
    constant = replace(options.optimizer, schedule="constant")
    return replace(options, batch_size=options.batch_size or _STREAM_BATCH, optimizer=constant)


def check_streamed(options: FitOptions, protocol: str, ordered: str | None) -> None:
    """Refuse what a stream cannot have, and an order of anything else.

    Args:
        options: of the fit.
        protocol: ``stream``, or another.
        ordered: the setting that gives an order; None without one.

    Raises:
        ValueError: they do not go together.
    """
    if protocol != "stream":
        if ordered is not None:
            raise ValueError(f"{ordered} is for protocol=stream, but protocol is {protocol}; leave one out")
        return
    if ordered is None:
        raise ValueError(
            "protocol is stream without an order; name the domains one after another, data.order=[photo,sketch], or "
            "the column with each row's time, data.time=COLUMN"
        )
    if options.tune.images:
        raise ValueError(
            "protocol=stream trains only adapters on frozen towers, and tune.parameters is "
            f"{options.tune.parameters}; leave one of them out"
        )
    if not options.epochs:
        raise ValueError("epochs is 0, and a stream is learned from as it comes; give 1 or more steps for each batch")
