"""The errors a user may meet: one sentence each, and the exit code that goes with it.

Every error says what is wrong, where, and what to do about it. The command line prints
the sentence and ends with :attr:`KngdError.exit_code`; nothing prints a traceback for a
mistake of the user's. Modules raise these only for input from outside: a broken
invariant of our own stays an ordinary exception.
"""

from collections.abc import Sequence
from difflib import get_close_matches


class KngdError(Exception):
    """Base of every error with a sentence for the user."""

    exit_code = 1


class UsageError(KngdError):
    """The command line or the configuration is wrong (exit code 2, nothing was started)."""

    exit_code = 2


class InputError(UsageError, ValueError, TypeError):
    """What a Python program gave cannot be used; scikit-learn raises a ValueError or a TypeError there."""


class DataError(KngdError):
    """A data set, picture, class list or feature cannot be used."""


class BadImage(DataError):  # noqa: N818 - the name says it
    """A picture cannot be decoded."""


class ModelError(KngdError):
    """A CLIP model or its checkpoint cannot be loaded."""


class CheckpointError(KngdError):
    """A run or checkpoint is missing, torn, corrupt or of another task."""


class FilterError(KngdError):
    """The filter cannot go on: non-finite innovations or an indefinite innovation covariance."""


class IndefiniteError(FilterError):
    """The innovation covariance is not positive definite, whatever is added to its diagonal."""


class StorageError(KngdError):
    """A result cannot be written: no space left, or a read-only or missing folder."""


class TrackingError(KngdError):
    """The tracking server does not answer or refuses."""


def closest(name: str, valid: Sequence[str], n: int = 1, cutoff: float = 0.5) -> list[str]:
    """The names that a misspelt one may mean, the likeliest first.

    Args:
        name: what was given; case is ignored.
        valid: what could have been given.
        n: how many are named at most.
        cutoff: likeness from which a name counts, 0 to 1.

    Returns:
        Up to n of the valid names.
    """
    spelling = {candidate.lower(): candidate for candidate in valid}
    return [spelling[match] for match in get_close_matches(name.lower(), spelling, n=n, cutoff=cutoff)]


def nearest(name: str, valid: Sequence[str], path: str = "") -> str:
    """The end of a message about a misspelt name.

    Args:
        name: what was given.
        valid: what could have been given.
        path: dotted path of the settings that the names are of, if they are settings.

    Returns:
        ``; did you mean x?`` where a name is close, and all valid names.
    """
    prefix = f"{path}." if path else ""
    guess = "".join(f"; did you mean {prefix}{match}?" for match in closest(name, valid))
    return f"{guess} (valid: {', '.join(sorted(valid))})" if valid else guess
