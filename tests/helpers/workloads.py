"""Fits that take some seconds, so that something can happen to them."""

import torch

from kngd_ray.filters import Ema, RandomWalk
from kngd_ray.observations import Categorical
from kngd_ray.training.batches import Support
from kngd_ray.training.fit import FitTask
from kngd_ray.training.options import FilterOptions, FitOptions, NoiseOptions

# settings of a command slow enough to be caught in the middle: 4 classes, exact rows of a head of 65,536 weights,
# linearised several times a step
SLOW_RUN = (
    "preset=kalman_diagonal",
    "filter.covariance=kronecker",
    "filter.iterations=6",
    "adapter=linear",
    "observation=categorical",
    "epochs=40",
    "batch_size=32",
    "posterior.folds=0",
    "trainer.checkpoint_every=5",
)


def long_task(steps: int) -> FitTask:
    """Exact Gauss-Newton rows of 20 classes, estimated noise, a process that moves."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(160, 256, generator=generator), dim=1)
    classes = torch.nn.functional.normalize(torch.randn(20, 256, generator=generator), dim=1)
    options = FitOptions(
        epochs=steps // 5,
        observation=(Categorical(samples=4),),
        filter=FilterOptions(p0=0.03),
        noise=NoiseOptions(process=RandomWalk(q=1e-5), observation=Ema(form="diagonal")),
    )
    return FitTask(options, 0, Support(features, torch.arange(160) % 20), classes, 18.0)
