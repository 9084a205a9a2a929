"""Kalman filters as pure functions on tensors: covariance families, noise, process, evidence.

A new family is one module beside :mod:`~kngd_ray.filters.diagonal` and one line in
:data:`CovarianceFamily`; a new process or noise model likewise.
"""

from kngd_ray.filters._family import Family
from kngd_ray.filters._innovation import Innovation, solve_innovation
from kngd_ray.filters._update import Belief, update
from kngd_ray.filters.dense import Dense
from kngd_ray.filters.diagonal import Diagonal
from kngd_ray.filters.noise import Ema, Fixed, ObservationNoise
from kngd_ray.filters.process import Process, RandomWalk, Transition

# The registries: configuration chooses among these by `kind`, and offers the fields of each as its options.
CovarianceFamily = Dense | Diagonal
ProcessModel = RandomWalk
NoiseModel = Fixed | Ema

__all__ = [
    "Belief",
    "CovarianceFamily",
    "Dense",
    "Diagonal",
    "Ema",
    "Family",
    "Fixed",
    "Innovation",
    "NoiseModel",
    "ObservationNoise",
    "Process",
    "ProcessModel",
    "RandomWalk",
    "Transition",
    "solve_innovation",
    "update",
]
