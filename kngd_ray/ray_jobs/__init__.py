"""Everything that runs on Ray: the session, Train jobs, searches on Tune, feature encoding with Ray Data.

Importing this package imports Ray, which takes seconds: commands do so when they need it.
"""

from kngd_ray.ray_jobs.encode import ray_stream
from kngd_ray.ray_jobs.session import ray_session
from kngd_ray.ray_jobs.train import run_job
from kngd_ray.ray_jobs.tune import run_search

__all__ = ["ray_session", "ray_stream", "run_job", "run_search"]
