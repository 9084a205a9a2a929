"""Kalman natural-gradient fine-tuning of CLIP models on Ray.

::

    import kngd_ray

    run = kngd_ray.train("kalman", data="pacs.parquet", train_domain="photo", shots=16, seeds=5)
    run.frame
    run.classifier.predict_proba(["cat.jpg"])

:func:`train` fits and :func:`tune` searches; :func:`evaluate` and :func:`compare` measure the results.
:func:`predict`, :func:`load` and :func:`export` use a fitted run, :func:`ensemble` averages its weights with the
pretrained ones, and :func:`sync` sends it to MLflow. :func:`encode` computes features ahead of time;
:func:`doctor` checks the machine and the cluster. :class:`KalmanCLIP` is a scikit-learn classifier without run folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kngd_ray.api import compare, doctor, encode, ensemble, evaluate, export, load, predict, sync, train, tune
    from kngd_ray.estimator import KalmanCLIP

__version__ = "0.1.0"

__all__ = [
    "KalmanCLIP",
    "__version__",
    "compare",
    "doctor",
    "encode",
    "ensemble",
    "evaluate",
    "export",
    "load",
    "predict",
    "sync",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import heavy modules on first use.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module("kngd_ray.estimator" if name == "KalmanCLIP" else "kngd_ray.api"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return list(__all__)
