"""What is measured: heads, batches, and one method of each kind on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import get_args

import torch
from torch.nn.functional import normalize

from benchmarks.step_cost.naive import NaiveRows
from kngd_ray.clip import CLIPHead
from kngd_ray.clip.adapters import AnyAdapter, Bottleneck, Linear
from kngd_ray.filters import CovarianceFamily, Dense, Diagonal, Family, Layer
from kngd_ray.observations import Cosine, LogLikelihood, Model, trainable
from kngd_ray.sharding import Group, SingleProcess, split_evenly
from kngd_ray.training.batches import Batch
from kngd_ray.training.gradient import GradientDescent
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.method import Method
from kngd_ray.training.options import FilterOptions, FitOptions

REFERENCE = "adamw"
_CLASSES = 20
_STEPS = 10**6  # length of a run, of which only the learning rate's schedule knows
_NUMBERS = 10**8  # a method that holds or forms more numbers than these is left out: 400 MB in float32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One head and one batch.

    Attributes:
        name: of the case in the results.
        adapter: what is trained.
        dim: d, width of the embedding.
        m: samples of the global batch.
        observation: observation models of the Kalman methods.
    """

    name: str
    adapter: AnyAdapter
    dim: int = 512
    m: int = 32
    observation: tuple[Model, ...] = (LogLikelihood(),)

    @property
    def k(self) -> int:
        """Observations per sample."""
        return sum(model.rows(_CLASSES) for model in self.observation)

    @cached_property
    def layers(self) -> list[Layer]:
        """The weights, all of them matrices of linear layers."""
        found = trainable(self.head("meta")).items()
        return [Layer(name, p.shape[0], p.shape[1], factored=True) for name, p in found]

    @property
    def n(self) -> int:
        """Number of weights."""
        return sum(layer.size for layer in self.layers)

    def head(self, device: str) -> CLIPHead:
        """The same head each time."""
        generator = torch.Generator().manual_seed(1)
        classes = normalize(torch.randn(_CLASSES, self.dim, generator=generator), dim=-1)
        with torch.device(device):
            return CLIPHead(classes.to(device), 100.0, (self.adapter,))

    def batch(self, device: str, group: Group) -> Batch:
        """This rank's part of the same batch each time."""
        generator = torch.Generator().manual_seed(2)
        features = normalize(torch.randn(self.m, self.dim, generator=generator), dim=-1)
        labels = torch.randint(_CLASSES, (self.m,), generator=generator)
        sizes = split_evenly(self.m, group.world_size)
        local = [part.split(sizes)[group.rank].to(device) for part in (features, labels)]
        return Batch(local[0], local[1], sizes, group.rank, 0)


MAIN = [
    Case(name="bottleneck, log_likelihood", adapter=Bottleneck(width=128)),
    Case(
        name="bottleneck, log_likelihood + cosine",
        adapter=Bottleneck(width=128),
        observation=(LogLikelihood(), Cosine(r0=1.0)),
    ),
    Case(name="linear, log_likelihood", adapter=Linear(), m=128),
]
GROWING_N = [Case(name=f"linear {d} x {d}", adapter=Linear(), dim=d) for d in (100, 316, 1000, 3162)]
GROWING_M = [replace(MAIN[0], name=f"bottleneck, m = {m}", m=m) for m in (8, 32, 128, 512)]

Make = Callable[[Case, str, Group], Method]


def families() -> dict[str, Family]:
    """Every covariance family of the package but the dense one, with default options."""
    found: dict[str, Family] = {f"diagonal {rule}": Diagonal(rule=rule) for rule in ("ekf", "vdekf")}
    others = (family() for family in get_args(CovarianceFamily) if family not in {Dense, Diagonal})
    return found | {family.kind: family for family in others}


def methods(case: Case) -> dict[str, Make]:
    """The methods that are feasible on a case, the reference first."""
    fits = {name: f for name, f in families().items() if sum(map(f.cost, case.layers)) <= _NUMBERS}
    made: dict[str, Make] = {REFERENCE: _adamw, **{name: partial(_kalman, family) for name, family in fits.items()}}
    if case.n * case.m * case.k <= _NUMBERS:
        made["naive"] = _naive
    return made


def _adamw(case: Case, device: str, group: Group) -> Method:
    return GradientDescent(case.head(device), FitOptions(method="adamw"), _STEPS, group)


def _kalman(family: Family, case: Case, device: str, group: Group) -> Method:
    filter_options = FilterOptions(covariance=family)  # type: ignore[arg-type]
    options = FitOptions(observation=case.observation, filter=filter_options)
    return KalmanNGD(case.head(device), options, group=group)


def _naive(case: Case, device: str, group: Group) -> Method:
    assert isinstance(group, SingleProcess)
    return NaiveRows(case.head(device), case.observation)
