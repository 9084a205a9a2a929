"""The errors a user may meet: one sentence each, and the exit code that goes with it.

Every error says what is wrong, where, and what to do about it. The command line prints
the sentence and ends with :attr:`KngdError.exit_code`; nothing prints a traceback for a
mistake of the user's. Modules raise these only for input from outside: a broken
invariant of our own stays an ordinary exception.
"""

import re
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches

# Keys that are known by their shape: of Amazon, Hugging Face, GitHub, GitLab, OpenAI and others, Slack and Google.
KEY_SHAPES = (
    r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_[A-Za-z0-9_]{30,}|glpat-[\w-]{20,}|sk-[\w-]{32,}|xox[abprs]-[\w-]{20,}|AIza[\w-]{35})"
)
_WORDS = (
    # filter.covariance.tokens is none
    r"(?:password|passwd|passphrase|pwd|(?:(?<!covariance\.)token|token(?!s))(?!s[\"']?\s*[=:]\s*[\"']?(?:exact|reduced)\b)"
    r"|secret|signature|credential|api[-_]?key|access[-_]?key|private[-_]?key"
    r"|account[-_]?key|shared[-_]?key|access[-_]?id|key[-_]?pair[-_]?id|authorization)"
)
_SECRETS = (
    (re.compile(r"://[^/\s]*@"), "://***@"),  # user and password of an address
    # PASSWORD=, X-Amz-Signature=, AWSAccessKeyId=, also within an address within another
    (re.compile(rf"({_WORDS}[^=&\s]{{0,20}}?(?:=|%3D))[^&\s]+", re.IGNORECASE), r"\1***"),
    (
        re.compile(r"((?<![A-Za-z0-9])(?:sig|sas)(?:=|%3D)|[?&](?:key|auth|code|policy)=)[^&\s]+", re.IGNORECASE),
        r"\1***",
    ),
    # a field of JSON, a header; a word of a sentence has no quotes and no hyphen in it
    (re.compile(rf"([\"'][\w.-]*{_WORDS}[\w.-]*[\"']\s*:\s*[\"'])[^\"']+", re.IGNORECASE), r"\1***"),
    (re.compile(r"((?:api|access|private|secret|auth)[-_](?:key|token):\s*)[^\s,;]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(\bbearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE), r"\1***"),
    (re.compile(r"(\bbasic\s+)(?=[A-Za-z+/]*[\d=])[\w+/=]{8,}", re.IGNORECASE), r"\1***"),
    (re.compile(KEY_SHAPES), "***"),
)
# Control characters, line ends, halves of surrogates, and marks that turn the direction of a text around: a name with
# them writes on a terminal what it likes, or a line of its own into a log. Joiners stay: some scripts need them.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)


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


class HubError(KngdError):
    """A model hub does not answer or refuses."""


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


def redact(text: str) -> str:
    """Take user names, passwords, keys, tokens and signatures out of every address, header and setting in a text.

    Args:
        text: an address or a message.

    Returns:
        The text, fit to be shown and stored.
    """
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def spelled(name: str) -> str:
    """A name in quotes, so that it is told from another that looks the same.

    Args:
        name: of a class or a file; macOS writes an accent as a character of its own, Linux and Windows do not.

    Returns:
        The name, with escapes for what is not ASCII where accents are apart (not Unicode's form NFC).
    """
    return repr(name) if unicodedata.is_normalized("NFC", name) else ascii(name)


def printable(text: str, keep: str = "") -> str:
    r"""Write out what a terminal or a log would take for a command: names come from files.

    Args:
        text: with names of files, classes or runs in it.
        keep: characters that may stay, such as a line end.

    Returns:
        The text with escapes such as ``\x1b`` and ``\n`` in their place.
    """
    return _CONTROLS.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)
