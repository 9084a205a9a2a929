"""Ray for as long as a command needs it, or not at all."""

from contextlib import AbstractContextManager, nullcontext

from kngd_ray.config import TrainerConfig


def ray_for(trainer: TrainerConfig, *, dashboard: bool = False) -> AbstractContextManager[None]:
    """A Ray session that holds the trainer's workers at once; nothing when there are none.

    Ray is imported only if it is needed: that alone takes seconds.

    Args:
        trainer: workers, resources and the cluster's address.
        dashboard: start it, on loopback, with an instance on this machine.

    Returns:
        A context manager.
    """
    n = trainer.least_workers
    if not n:
        return nullcontext()
    from kngd_ray.ray_jobs import ray_session

    return ray_session(trainer.address, cpus=n * trainer.cpus_per_worker, gpus=n * trainer.use_gpu, dashboard=dashboard)
