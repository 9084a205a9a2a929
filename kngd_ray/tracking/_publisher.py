"""Publishing in the background while a run goes on."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from kngd_ray.errors import KngdError
from kngd_ray.tracking._publish import publish
from kngd_ray.tracking._uri import resolve_uri

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 300.0
_DOUBLINGS = 10  # of the wait: more reach no longer one, and a float in the end no number


class Publisher:
    """Publishes a run folder every few seconds, from a thread of its own; never stops the run.

    While the store is down, `on_problem` is called once, and attempts grow rarer, to one in five
    minutes. Nothing is lost meanwhile: what was not sent stays in the run folder.

    Args:
        run_folder: the run's folder.
        uri: the tracking store.
        experiment: name of the experiment.
        every_s: seconds between attempts.
        on_problem: called with one sentence per outage, from the thread; None logs a warning.

    Raises:
        TrackingError: MLflow has no such store.
    """

    def __init__(
        self,
        run_folder: Path,
        uri: str,
        experiment: str,
        every_s: float = 10.0,
        on_problem: Callable[[str], None] | None = None,
    ) -> None:
        self._run_folder = run_folder
        self._uri = resolve_uri(uri)  # now: the current folder may change
        self._experiment = experiment
        self._every = every_s
        self._on_problem = on_problem or logger.warning
        self._closing = threading.Event()
        self._failures = 0
        self._thread = threading.Thread(target=self._loop, name="kngd_ray publisher", daemon=True)
        self._thread.start()

    def close(self, patience: float | None = None) -> dict[str, str] | None:
        """Stop the thread and publish once more; records should be finished by now.

        Args:
            patience: seconds after which what is left is given up, to be sent later; None waits as long as it takes.

        Returns:
            MLflow run id by record id, or None when this last publish failed, or took too long.
        """
        self._closing.set()
        last: list[dict[str, str] | None] = []

        def finish() -> None:
            self._thread.join()
            last.append(self._publish())

        # an unfinished one ends with the process, and leaves nothing that the next could not go on from
        thread = threading.Thread(target=finish, name="kngd_ray last publisher", daemon=True)
        thread.start()
        thread.join(patience)
        return last[0] if last else None

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _loop(self) -> None:
        wait = min(self._every, 1.0)  # so that the run appears soon
        while not self._closing.wait(wait):
            self._publish()
            wait = min(self._every * 2 ** min(self._failures, _DOUBLINGS), max(_LONGEST_WAIT, self._every))

    def _publish(self) -> dict[str, str] | None:
        try:
            published = publish(self._run_folder, self._uri, self._experiment)
        except Exception as error:  # whatever it is, the run goes on
            self._failures += 1
            if self._failures == 1:
                unexpected = not isinstance(error, KngdError)
                self._on_problem(f"publishing failed: {error!r}" if unexpected else str(error))
                logger.debug("publishing failed", exc_info=True)
            return None
        self._failures = 0
        return published
