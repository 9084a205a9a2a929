"""Kalman natural-gradient fine-tuning of CLIP models on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kngd_ray.estimator import KalmanCLIP as KalmanCLIP

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is asked for.

    Raises:
        AttributeError: there is no such name.
    """
    if name == "KalmanCLIP":
        from kngd_ray.estimator import KalmanCLIP

        return KalmanCLIP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "KalmanCLIP"])
