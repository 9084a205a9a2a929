"""The errors a user may meet: one sentence each, and the exit code that goes with it.

Every error says what is wrong, where, and what to do about it. The command line prints
the sentence and ends with :attr:`KngdError.exit_code`; nothing prints a traceback for a
mistake of the user's. Modules raise these only for input from outside: a broken
invariant of our own stays an ordinary exception.
"""


class KngdError(Exception):
    """Base of every error with a sentence for the user."""

    exit_code = 1


class UsageError(KngdError):
    """The command line or the configuration is wrong (exit code 2, nothing was started)."""

    exit_code = 2


class DataError(KngdError):
    """A data set, picture, class list or feature cannot be used."""


class ModelError(KngdError):
    """A CLIP model or its checkpoint cannot be loaded."""


class CheckpointError(KngdError):
    """A run or checkpoint is missing, torn, corrupt or of another task."""


class FilterError(KngdError):
    """The filter cannot go on: non-finite innovations or an indefinite innovation covariance."""


class StorageError(KngdError):
    """A result cannot be written: no space left, or a read-only or missing folder."""


class TrackingError(KngdError):
    """The tracking server does not answer or refuses."""
