"""Where the work of a run is done: in this process, or by the workers of whatever extends :class:`Backend`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from kngd_ray.clip import ModelConfig, best_device
from kngd_ray.config import TrainerConfig
from kngd_ray.data import Crops, EncodedStream, ImageSet
from kngd_ray.errors import UsageError
from kngd_ray.training.job import FitEvent, Job, run_fits


class Backend:
    """This process, alone. :class:`kngd_ray.cluster.backend.RayBackend` adds workers."""

    def session(self, trainer: TrainerConfig, *, dashboard: bool = False) -> AbstractContextManager[None]:
        """Reserve the resources that the trainer's workers need at once.

        Args:
            trainer: workers, resources and the cluster's address.
            dashboard: start one, on loopback, with an instance on this machine.

        Returns:
            A context manager.

        Raises:
            UsageError: workers are asked for, which this process has not.
        """
        if trainer.least_workers:
            raise UsageError(f"trainer.num_workers is {trainer.num_workers}, and this process has no workers: set 0.")
        return nullcontext()

    def with_gpus(self, trainer: TrainerConfig) -> TrainerConfig:
        """Decide ``use_gpu: auto``, in a session.

        Args:
            trainer: of the run.

        Returns:
            The same with a yes or no: whether each rank has a GPU, or this process where there is no rank.

        Raises:
            UsageError: a GPU is asked for in this process, which has none.
        """
        there = best_device() != "cpu"
        if trainer.use_gpu is True and not there:
            raise UsageError(
                "trainer.use_gpu is true and this machine has no usable GPU: leave it out, or join a cluster."
            )
        return trainer if trainer.use_gpu != "auto" else replace(trainer, use_gpu=there)

    def run_fits(self, job: Job, trainer: TrainerConfig, on_event: Callable[[FitEvent], None]) -> None:
        """Run the fits of a job to their end, in a session.

        Args:
            job: the fits.
            trainer: workers, resources and fault tolerance.
            on_event: called with each step, in this thread.
        """
        run_fits(job, on_event, device="cuda" if trainer.use_gpu else "cpu")

    def stream(
        self, images: ImageSet, model: ModelConfig, trainer: TrainerConfig, crops: Crops | None = None
    ) -> EncodedStream | None:
        """Encode pictures with workers, in a session.

        Args:
            images: the data set.
            model: that encodes.
            trainer: workers and resources.
            crops: encode these of the pictures; None encodes the pictures.

        Returns:
            A stream of encoded batches; None where this process encodes.
        """
        return None


HERE = Backend()
