"""Kalman natural-gradient fine-tuning of CLIP models on Ray.

::

    import kngd_ray

    run = kngd_ray.train("kalman", data="pacs.parquet", train_domain="photo", shots=16, seeds=5)
    run.frame
    run.classifier.predict_proba(["cat.jpg"])

:func:`train` and :func:`tune` fit, :func:`evaluate` and :func:`compare` judge, :func:`predict` and :func:`load` use
what was fitted. :class:`KalmanCLIP` is a classifier with scikit-learn's methods, without runs and files.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kngd_ray.api import compare, evaluate, load, predict, train, tune
    from kngd_ray.estimator import KalmanCLIP

__version__ = "0.1.0"

__all__ = ["KalmanCLIP", "__version__", "compare", "evaluate", "load", "predict", "train", "tune"]


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is asked for.

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
