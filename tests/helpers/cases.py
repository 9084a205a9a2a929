"""The matrix of cases that the tests share: adapters, observation models, families, noise, gates, tiny data."""

from collections.abc import Iterable
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kngd_ray.clip import CLIPHead
from kngd_ray.clip.adapters import AnyAdapter, Bottleneck, ClassResidual, Linear
from kngd_ray.filters import (
    BlockDiagonal,
    CovarianceFamily,
    Dense,
    Diagonal,
    DiagonalLowRank,
    Ema,
    Fixed,
    Forgetting,
    GateModel,
    Inflate,
    Kronecker,
    NoGate,
    NoiseModel,
    OrnsteinUhlenbeck,
    ProcessModel,
    RandomWalk,
    Skip,
)
from kngd_ray.filters import (
    Categorical as LikelihoodNoise,
)
from kngd_ray.observations import Categorical, Cosine, LogLikelihood, Model, Probability
from kngd_ray.training.batches import Support
from kngd_ray.training.fit import FitTask
from kngd_ray.training.options import FilterOptions, FitOptions, NoiseOptions

DIM, CLASSES, LOGIT_SCALE = 6, 4, 8.0

ADAPTERS: dict[str, tuple[AnyAdapter, ...]] = {
    "bottleneck-image": (Bottleneck(width=3),),
    "bottleneck-text": (Bottleneck(tower="text", width=3),),
    "bottleneck-both": (Bottleneck(tower="both", width=2, ratio=0.3),),
    "linear-image": (Linear(),),
    "linear-text": (Linear(tower="text"),),
    "linear-both": (Linear(tower="both"),),
    "class_residual": (ClassResidual(),),
    "linear+class_residual": (Linear(), ClassResidual()),
    "bottleneck+linear+class_residual": (
        Bottleneck(tower="both", width=2),
        Linear(tower="text"),
        ClassResidual(),
    ),
}

OBSERVATIONS: dict[str, tuple[Model, ...]] = {
    "cosine": (Cosine(),),
    "probability": (Probability(),),
    "log_likelihood": (LogLikelihood(),),
    "categorical": (Categorical(),),
    "categorical-sampled": (Categorical(samples=2),),
    "log_likelihood+cosine": (LogLikelihood(), Cosine(r0=1.0)),
    "all": (Cosine(), Probability(), LogLikelihood(r0=2.0), Categorical(samples=1)),
}

FAMILIES: dict[str, CovarianceFamily] = {
    "dense": Dense(),
    "ekf": Diagonal(rule="ekf"),
    "vdekf": Diagonal(rule="vdekf"),
    "block_diagonal": BlockDiagonal(size=5),
    "diagonal_low_rank": DiagonalLowRank(rank=3),
    "kronecker": Kronecker(),
}

NOISES: dict[str, NoiseModel] = {
    "fixed": Fixed(),
    "ema-scalar": Ema(beta=0.8),
    "ema-diagonal": Ema(beta=0.8, form="diagonal"),
    "ema-full": Ema(beta=0.8, form="full"),
    "categorical": LikelihoodNoise(),
}

PROCESSES: dict[str, ProcessModel] = {
    "random_walk": RandomWalk(q=1e-3),
    "ornstein_uhlenbeck": OrnsteinUhlenbeck(gamma=0.9),
    "forgetting": Forgetting(factor=0.9, rate=0.95),
}

GATES: dict[str, GateModel] = {
    "off": NoGate(),
    "inflate": Inflate(quantile=0.7),
    "skip": Skip(quantile=0.7),
}

TEMPERING: tuple[Literal["passes", "none"], ...] = ("passes", "none")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def class_embeddings(dtype: torch.dtype = torch.float64) -> Tensor:
    return normalize(torch.randn(CLASSES, DIM, generator=rng(1), dtype=torch.float64), dim=1).to(dtype)


def make_support(n: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Support:
    """Unit features scattered around their classes' text embeddings, so that accuracy is neither 0 nor 1."""
    generator = rng(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    noise = torch.randn(n, DIM, generator=generator, dtype=torch.float64)
    return Support(normalize(class_embeddings()[labels] + 0.7 * noise, dim=1).to(dtype), labels)


def make_head(adapters: tuple[AnyAdapter, ...], dtype: torch.dtype = torch.float64, perturb: float = 0.2) -> CLIPHead:
    """A head whose weights are away from zero, where the Jacobians of some adapters would be trivial."""
    head = CLIPHead(class_embeddings(dtype), LOGIT_SCALE, adapters).to(dtype)
    generator = rng(3)
    with torch.no_grad():
        for p in head.parameters():
            p.add_((perturb * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype))
    return head


def make_options(
    family: str = "ekf",
    observation: str = "log_likelihood+cosine",
    adapter: str = "class_residual",
    noise: str = "fixed",
    process: str = "random_walk",
    gate: str = "off",
    iterations: int = 1,
    serial: int = 0,
    tempering: Literal["passes", "none"] = "passes",
    **changes: object,
) -> FitOptions:
    """Options by the names of this module; anything else by keyword."""
    settings = {
        "epochs": 2,
        "batch_size": 7,
        "adapter": ADAPTERS[adapter],
        "observation": OBSERVATIONS[observation],
        "filter": FilterOptions(
            covariance=FAMILIES[family], p0=0.05, gate=GATES[gate], iterations=iterations, serial=serial
        ),
        "noise": NoiseOptions(process=PROCESSES[process], observation=NOISES[noise], tempering=tempering),
    }
    return FitOptions(**(settings | changes))  # type: ignore[arg-type]


def make_task(options: FitOptions, shots: int = 15, seed: int = 0, dtype: torch.dtype = torch.float32) -> FitTask:
    """A whole fit, in float32 as adapters are built; float64 needs torch's default dtype to say so."""
    return FitTask(options, seed, make_support(shots, dtype), class_embeddings(dtype), LOGIT_SCALE)


def some_slow(names: Iterable[Any], *quick: Any) -> list[Any]:
    """Cases of which all but a few are slow: what they have in common is met in those."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def in_turn(*lists: Iterable[Any]) -> list[Any]:
    """All combinations; of two lists every name is met in those that are not slow, of three every pair of names."""
    indexed = [list(enumerate(names)) for names in lists]
    least = min(map(len, indexed))
    return [
        pytest.param(*(name for _, name in combination), marks=() if first else pytest.mark.slow)
        for combination in product(*indexed)
        for first in [sum(i for i, _ in combination) % least == 0]
    ]
