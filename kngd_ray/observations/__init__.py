"""Observation models: what the filter sees of a batch, and the Jacobian of what it sees.

A new model is one module beside :mod:`~kngd_ray.observations.cosine` and one name in
:data:`Model`.
"""

from typing import TYPE_CHECKING

from kngd_ray._deferred import on_demand
from kngd_ray._plugins import open_registry
from kngd_ray.observations._model import Observation, ObservationModel, stack
from kngd_ray.observations.categorical import Categorical
from kngd_ray.observations.clip_cite import ClipCite
from kngd_ray.observations.cosine import Cosine
from kngd_ray.observations.log_likelihood import LogLikelihood
from kngd_ray.observations.probability import Probability

if TYPE_CHECKING:
    from kngd_ray.observations.jacobian import flatten, jacobian_rows, trainable, unflatten
    from kngd_ray.observations.linearise import Linearisation, Linearizer

# The registry: configuration chooses among these by `kind`, and offers the fields of each as its options.
Model = Cosine | Probability | LogLikelihood | Categorical | ClipCite
open_registry(Model, "kngd_ray.observations")  # installed packages may add to it

__all__ = [
    "Categorical",
    "ClipCite",
    "Cosine",
    "Linearisation",
    "Linearizer",
    "LogLikelihood",
    "Model",
    "Observation",
    "ObservationModel",
    "Probability",
    "flatten",
    "jacobian_rows",
    "stack",
    "trainable",
    "unflatten",
]

# Imported when they are asked for: they need torch, and whoever reads the settings does not.
_HOMES = {
    "Linearisation": "linearise",
    "Linearizer": "linearise",
    "flatten": "jacobian",
    "jacobian_rows": "jacobian",
    "trainable": "jacobian",
    "unflatten": "jacobian",
}

__getattr__ = on_demand(__name__, _HOMES)
