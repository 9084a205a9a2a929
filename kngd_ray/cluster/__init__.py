"""Everything that runs on Ray: the session, Train jobs, searches on Tune, feature encoding with Ray Data.

Importing one of these names imports Ray and what else it needs, which takes seconds: commands do so when they need it.
"""

from typing import TYPE_CHECKING

from kngd_ray._deferred import on_demand

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

__getattr__ = on_demand(__name__, _HOMES)
