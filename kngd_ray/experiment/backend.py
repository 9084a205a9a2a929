"""Ray for as long as a command needs it, or not at all."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from kngd_ray.config import TrainerConfig
from kngd_ray.errors import UsageError


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
    from kngd_ray.cluster import ray_session

    gpus = n if trainer.use_gpu is True else 0
    return ray_session(trainer.address, cpus=n * trainer.cpus_per_worker, gpus=gpus, dashboard=dashboard)


def with_gpus(trainer: TrainerConfig) -> TrainerConfig:
    """Decide ``use_gpu: auto``, once Ray is up where it is needed.

    A fit is the same on any number of ranks. So where GPUs are fewer than ranks, no more ranks run than there are GPUs:
    one GPU serves better than all the cores beside it.

    Args:
        trainer: of the run.

    Returns:
        The same with a yes or no: whether each rank has a GPU, or this process where there is no rank. With no more
        ranks than GPUs, if it was left to us.

    Raises:
        UsageError: a GPU is asked for in this process, which has none.
    """
    if not trainer.least_workers:
        from kngd_ray.clip import best_device  # which imports torch, that not every command needs

        there = best_device() != "cpu"
        if trainer.use_gpu is True and not there:
            raise UsageError(
                "trainer.use_gpu is true and this machine has no usable GPU: leave it out, or join a cluster."
            )
    elif trainer.use_gpu == "auto":
        from kngd_ray.cluster import gpus_of_cluster

        gpus = int(gpus_of_cluster())
        there = gpus > 0
        if there and gpus < trainer.most_workers:
            least = min(trainer.least_workers, gpus)
            return replace(trainer, use_gpu=True, num_workers=(least, gpus))
    return trainer if trainer.use_gpu != "auto" else replace(trainer, use_gpu=there)
