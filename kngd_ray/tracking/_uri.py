"""Addresses of tracking stores: made absolute, checked, and shown without their secrets."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kngd_ray.errors import TrackingError, redact

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def is_database(uri: str) -> bool:
    """Whether MLflow opens the store itself, instead of asking a server."""
    return urlsplit(uri).scheme.split("+")[0] in _DATABASES


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other store.

    Addresses are percent-encoded. But ``sqlite:///$WORKSPACE/mlflow.db``, where the workspace is called ``a%20b``,
    means that folder: a folder that exists under the name as written is taken literally.
    """
    written = uri.partition("///")[2].partition("?")[0]
    if not uri.startswith("sqlite:") or written.startswith("file:"):
        return None
    literal, decoded = Path(written), Path(unquote(written))
    return literal if literal.parent.is_dir() and not decoded.parent.is_dir() else decoded


@contextmanager
def without_stray_folder(uri: str) -> Iterator[None]:
    """Remove the empty folder that MLflow makes beside that of a SQLite file with a ``%`` in its path.

    MLflow does not decode the address when it makes the file's folder, so that of ``a%25b/mlflow.db`` is made twice:
    as ``a%b``, where the file is, and as ``a%25b``.

    Args:
        uri: of the store that is opened meanwhile.
    """
    literal = Path(uri.partition("///")[2].partition("?")[0])
    stray = [] if sqlite_file(uri) in {None, literal} else list(takewhile(lambda f: not f.exists(), literal.parents))
    try:
        yield
    finally:
        for folder in stray:
            with suppress(OSError):  # it was not made, or somebody uses it
                folder.rmdir()


def resolve_uri(uri: str, folder: Path | None = None) -> str:
    """Make a tracking address valid in any process: a relative SQLite file becomes absolute.

    Args:
        uri: ``sqlite:///mlflow.db``, ``https://tracking.example.org``, ``postgresql://...``.
        folder: what a relative file is relative to; None is the current folder.

    Returns:
        The address.

    Raises:
        TrackingError: MLflow has no such store.
    """
    scheme = urlsplit(uri).scheme
    if scheme in {"http", "https"} and not urlsplit(uri).hostname:
        raise TrackingError(f"tracking.uri is {redact(uri)!r}, which has no host; give http://HOST:PORT.")
    if not (scheme in {"http", "https", "databricks"} or uri == "databricks" or is_database(uri)):
        hint = "a folder or file alone is no store; " if not scheme or scheme == "file" else ""
        raise TrackingError(
            f"tracking.uri is {redact(uri)!r}, which is not an MLflow store; {hint}"
            "give sqlite:///mlflow.db, http://HOST:PORT or a database address."
        )
    path = sqlite_file(uri)
    if path is None:
        return uri
    if str(path) in {".", "", ":memory:"}:
        raise TrackingError(
            f"tracking.uri is {uri!r}, which is not kept on disk; name a file, as in sqlite:///mlflow.db."
        )
    driver, _, rest = uri.partition("///")
    query = rest.partition("?")[1:]
    absolute = str(((folder or Path.cwd()) / path).resolve())
    # SQLAlchemy decodes what it is given, and takes what follows a question mark for options
    encoded = absolute.replace("%", "%25").replace("?", "%3F")
    return f"{driver}///{encoded}{''.join(query)}"
