"""Kalman filters as pure functions on tensors: covariance families, noise, process, gate, evidence.

A new family is one module beside :mod:`~kngd_ray.filters.diagonal` and one name in
:data:`CovarianceFamily`; a new process or noise model likewise.
"""

from kngd_ray._plugins import open_registry
from kngd_ray.filters._family import Covariance, Family, Work
from kngd_ray.filters._innovation import Innovation, random_signs, solve_innovation
from kngd_ray.filters._layerwise import Layered, Layerwise
from kngd_ray.filters._update import Belief, innovation_covariance, update, variances
from kngd_ray.filters.block_diagonal import BlockDiagonal
from kngd_ray.filters.dense import Dense
from kngd_ray.filters.diagonal import Diagonal
from kngd_ray.filters.gate import Gate, GateResiduals, Inflate, NoGate, Skip
from kngd_ray.filters.informed import common_offset
from kngd_ray.filters.jacobian import Factors, Jacobian, Layer, Part, Rows, scaled
from kngd_ray.filters.kronecker import Kronecker
from kngd_ray.filters.left_out import PriorWithout, spread_left_out
from kngd_ray.filters.low_rank import DiagonalLowRank
from kngd_ray.filters.noise import Categorical, Ema, Fixed, ObservationNoise, Seen, Whitening
from kngd_ray.filters.per_layer import PerLayer
from kngd_ray.filters.prior_mean import Calibrated, ZeroShot
from kngd_ray.filters.process import Forgetting, OrnsteinUhlenbeck, Process, RandomWalk, Transition
from kngd_ray.filters.softmax import Classified, HeldOut, SoftmaxPosterior
from kngd_ray.filters.softmax import condition as condition_softmax

# The registries: configuration chooses among these by `kind`, and offers the fields of each as its options.
CovarianceFamily = Dense | Diagonal | BlockDiagonal | DiagonalLowRank | Kronecker
ProcessModel = RandomWalk | OrnsteinUhlenbeck | Forgetting
NoiseModel = Fixed | Ema | Categorical
GateModel = NoGate | Inflate | Skip
PriorMean = ZeroShot | Calibrated
open_registry(CovarianceFamily, "kngd_ray.families")  # installed packages may add to it

__all__ = [
    "Belief",
    "BlockDiagonal",
    "Calibrated",
    "Categorical",
    "Classified",
    "Covariance",
    "CovarianceFamily",
    "Dense",
    "Diagonal",
    "DiagonalLowRank",
    "Ema",
    "Factors",
    "Family",
    "Fixed",
    "Forgetting",
    "Gate",
    "GateModel",
    "GateResiduals",
    "HeldOut",
    "Inflate",
    "Innovation",
    "Jacobian",
    "Kronecker",
    "Layer",
    "Layered",
    "Layerwise",
    "NoGate",
    "NoiseModel",
    "ObservationNoise",
    "OrnsteinUhlenbeck",
    "Part",
    "PerLayer",
    "PriorMean",
    "PriorWithout",
    "Process",
    "ProcessModel",
    "RandomWalk",
    "Rows",
    "Seen",
    "Skip",
    "SoftmaxPosterior",
    "Transition",
    "Whitening",
    "Work",
    "ZeroShot",
    "common_offset",
    "condition_softmax",
    "innovation_covariance",
    "random_signs",
    "scaled",
    "solve_innovation",
    "spread_left_out",
    "update",
    "variances",
]
