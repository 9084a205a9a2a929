"""Events from a job's workers to its driver, and whether their cluster is still alive."""

import logging
import socket
import time

import ray
from ray.exceptions import RayError
from ray.util.queue import Empty, Queue

from kngd_ray._option import option
from kngd_ray.config import TrainerConfig
from kngd_ray.errors import KngdError
from kngd_ray.training.job import FitEvent

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_KNOCK_SECONDS = 2.0
_GONE_SECONDS = 20.0  # a head that is back sooner has not gone; after 60 Ray itself would end this process
_COUNT_SECONDS = 30.0


class Cluster:
    """Whether the cluster is still there: where its head has gone, calls wait for a minute, or without end.

    Args:
        trainer: what the job needs of it.
    """

    def __init__(self, trainer: TrainerConfig) -> None:
        self._trainer = trainer
        self._address: str = ray.get_runtime_context().gcs_address
        self._in_reach = _answers(self._address)  # not through ray://, where the address is that of another network
        self._heard = self._knocked = self._counted = time.monotonic()

    def check(self) -> None:
        """Look at it, if that was not done just now.

        Raises:
            KngdError: its head has not answered for a while.
        """
        now = time.monotonic()
        if not self._in_reach or now - self._knocked < _KNOCK_SECONDS:
            return
        self._knocked = now
        if _answers(self._address):
            self._heard = now
            self._count(now)
        elif now - self._heard > _GONE_SECONDS:
            raise self.gone()

    def gone(self, error: RayError | None = None) -> KngdError:
        """What to say where it has, or a call said so.

        Args:
            error: of the call.

        Returns:
            One sentence.
        """
        if error is not None and _answers(self._address):
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")
            return KngdError(
                f"the Ray cluster at {self._address} has dropped this command ({reason}): see its logs, and continue "
                f"the run with {option('resume')}."
            )
        return KngdError(
            f"the connection to the Ray cluster at {self._address} is lost, its head must have died: when there is a "
            f"cluster again, continue the run with {option('resume')}."
        )

    def _count(self, now: float) -> None:
        """Say what a silent job may be waiting for."""
        if now - self._counted < _COUNT_SECONDS:
            return
        self._counted = now
        resources = ray.cluster_resources()
        for name, each in (("CPU", self._trainer.cpus_per_worker), ("GPU", float(self._trainer.use_gpu is True))):
            needed, there = each * self._trainer.least_workers, resources.get(name, 0.0)
            if there < needed:
                logger.warning("the job waits for a node: it needs %g %ss, and Ray has %g left", needed, name, there)


class EventQueue:
    """What workers send, fetched without a call that could wait for ever.

    Args:
        queue: that they send to.
        cluster: that is looked at while nothing comes.
    """

    def __init__(self, queue: Queue, cluster: Cluster) -> None:
        self._queue = queue
        self._cluster = cluster

    def wait(self) -> list[FitEvent]:
        """Wait a little for something to come.

        Returns:
            Events in their order; none if nothing came.

        Raises:
            KngdError: the cluster has gone.
        """
        try:
            asked = self._queue.actor.get.remote(_POLL_SECONDS)  # Queue.get would wait for its answer without end
            while not ray.wait([asked], timeout=_KNOCK_SECONDS)[0]:
                self._cluster.check()
            events = [FitEvent(**fields) for fields in ray.get(asked)]
        except Empty:
            self._cluster.check()
            return []
        except RayError as error:  # the queue lives on this node
            raise self._cluster.gone(error) from error
        return events


def _answers(address: str) -> bool:
    """Whether somebody listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except OSError:
        return False
    return True
