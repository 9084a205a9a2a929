"""What a tracking store's failure means and what to do about it, as the end of a sentence."""

from kngd_ray.errors import redact

_LATER = "the results are in the run folder, send them with kngd-ray sync"
_ANSWERS = (  # (what the message holds, what to say); the first that fits
    (
        ("error code 401", "error code 403", "UNAUTHENTICATED", "PERMISSION_DENIED"),
        "refuses access: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    (("database is locked",), "is locked by another process: end it or wait"),
    (("disk is full", "No space left"), "has no space left: free some"),
    (("readonly database", "unable to open database"), "cannot be written: check the file and its permissions"),
    (("file is not a database",), "is not a SQLite database: check tracking.uri"),
    (
        ("out-of-date database schema",),
        "was made by another version of MLflow: back it up, then run `mlflow db upgrade` with its address",
    ),
    (("error code 404", "not in a valid JSON format"), "does not respond like MLflow: check tracking.uri"),
    (("too many 5", "error code 5"), "fails with an internal error: see the server's log"),
)
_SILENCE = (  # how the clients of servers and databases say that there is nobody
    ("Connection refused", "connection refused"),
    ("Name or service not known", "unknown host"),
    ("name resolution", "unknown host"),
    ("unreachable", "network unreachable"),
    ("No route to host", "no route to host"),
    ("Connection aborted", "connection lost"),
    ("timed out", "timed out"),
    ("timeout", "timed out"),
)


def reason(error: Exception) -> str:
    """Name the cause of a failure and the way out.

    Args:
        error: whatever MLflow, or a client below it, has raised.

    Returns:
        The end of a sentence whose subject is the store, without secrets.
    """
    text = redact(str(error))
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)[:300]
    for marks, answer in _ANSWERS:
        if any(mark in text for mark in marks):
            return f"{answer}; {_LATER}."
    for mark, cause in _SILENCE:
        if mark in text:
            return f"does not respond ({cause}): check tracking.uri and that the server runs; {_LATER}."
    if isinstance(error, ImportError):
        return f"needs a package that is not installed ({first}): install it; {_LATER}."
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot be written ({first}): check the path and its permissions; {_LATER}."
    return f"refuses ({first}): check tracking.uri; {_LATER}."
