"""How often steps may be refused before a fit has failed."""

from kngd_ray.errors import FilterError, IndefiniteError
from kngd_ray.training.batches import Batch
from kngd_ray.training.method import Method, StepStats

_MAX_REFUSED = 10


class Refusals:
    """Counts refused steps, and ends a fit that has too many in a row.

    Args:
        steps: of the whole fit.
    """

    def __init__(self, steps: int) -> None:
        # a few-shot fit may have fewer steps than that; one that never moved has failed too
        self._most = min(_MAX_REFUSED, steps)
        self._in_a_row = 0

    def attempt(self, method: Method, batch: Batch) -> tuple[StepStats | None, str | None]:
        """Take a step.

        Args:
            method: the optimiser.
            batch: its batch.

        Returns:
            The figures of the step, or why it was refused.

        Raises:
            FilterError: too many were refused in a row.
            IndefiniteError: the innovation covariance S is not positive definite, whatever its jitter.
        """
        try:
            stats = method.step(batch)
        except IndefiniteError:
            raise
        except FilterError as error:
            self._in_a_row += 1
            if self._in_a_row >= self._most:
                raise FilterError(
                    f"{self._in_a_row} step{'s in a row were' if self._in_a_row > 1 else ' was'} refused, the last at "
                    f"step {batch.step + 1}: {error}"
                ) from error
            return None, str(error)
        self.taken()
        return stats, None

    def taken(self) -> None:
        """A step was taken."""
        self._in_a_row = 0
