"""Everything that runs on Ray: the session, Train jobs, searches on Tune, feature encoding with Ray Data.

Importing one of these names imports Ray and what else it needs, which takes seconds: commands do so when they need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kngd_ray.cluster.encode_job import ray_stream
    from kngd_ray.cluster.session import gpus_of_cluster, ray_session
    from kngd_ray.cluster.train_job import run_job
    from kngd_ray.cluster.tune_job import run_search

__all__ = ["gpus_of_cluster", "ray_session", "ray_stream", "run_job", "run_search"]

# Each from its own module: who looks at a job on a cluster needs neither torch nor Ray Train.
_HOMES = {
    "gpus_of_cluster": "session",
    "ray_session": "session",
    "ray_stream": "encode_job",
    "run_job": "train_job",
    "run_search": "tune_job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
