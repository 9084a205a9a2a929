"""Ray as the backend of runs and searches that ask for workers; those that do not stay in this process.

Ray is imported when it is needed: that alone takes seconds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from kngd_ray.clip import ModelConfig
from kngd_ray.config import TrainerConfig
from kngd_ray.data import Crops, EncodedStream, ImageSet
from kngd_ray.training.job import FitEvent, Job
from kngd_ray.tuning import Driver, Workload
from kngd_ray.tuning.run import SearchBackend


class RayBackend(SearchBackend):
    """Workers of a Ray cluster, where ``trainer.num_workers`` names some."""

    def session(self, trainer: TrainerConfig, *, dashboard: bool = False) -> AbstractContextManager[None]:
        """Join or start Ray, with room for the trainer's workers at once; see :meth:`Backend.session`."""
        workers = trainer.least_workers
        if not workers:
            return super().session(trainer)
        from kngd_ray.cluster import ray_session

        gpus = workers if trainer.use_gpu is True else 0
        return ray_session(trainer.address, cpus=workers * trainer.cpus_per_worker, gpus=gpus, dashboard=dashboard)

    def with_gpus(self, trainer: TrainerConfig) -> TrainerConfig:
        """Give each rank a GPU, and run no more ranks than the cluster has GPUs; see :meth:`Backend.with_gpus`.

        A fit is the same on any number of ranks, and one GPU serves better than all the cores beside it.
        """
        if not trainer.least_workers:
            return super().with_gpus(trainer)
        if trainer.use_gpu != "auto":
            return trainer
        from kngd_ray.cluster import gpus_of_cluster

        gpus = int(gpus_of_cluster())
        if not 0 < gpus < trainer.most_workers:
            return replace(trainer, use_gpu=gpus > 0)
        return replace(trainer, use_gpu=True, num_workers=(min(trainer.least_workers, gpus), gpus))

    def run_fits(self, job: Job, trainer: TrainerConfig, on_event: Callable[[FitEvent], None]) -> None:
        """Run the fits as one Ray Train job; see :meth:`Backend.run_fits`."""
        if not trainer.num_workers:
            super().run_fits(job, trainer, on_event)
            return
        from kngd_ray.cluster import run_job

        run_job(job, trainer, on_event)

    def stream(
        self, images: ImageSet, model: ModelConfig, trainer: TrainerConfig, crops: Crops | None = None
    ) -> EncodedStream | None:
        """Encode with Ray Data; see :meth:`Backend.stream`."""
        if not trainer.most_workers:
            return None
        from kngd_ray.cluster import ray_stream

        trainer = self.with_gpus(trainer)
        encoders = max(trainer.least_workers, 1)
        return ray_stream(images, model, encoders=encoders, use_gpu=trainer.use_gpu is True, crops=crops)

    def run_search(self, driver: Driver, work: Workload, trainer: TrainerConfig, mode: str, folder: Path) -> None:
        """Run the trials with Ray Tune; see :meth:`SearchBackend.run_search`."""
        if not trainer.num_workers:
            super().run_search(driver, work, trainer, mode, folder)
            return
        from kngd_ray.cluster import run_search

        run_search(driver, work, trainer, mode, folder)
