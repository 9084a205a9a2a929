"""Addresses of tracking stores: made absolute, checked, and shown without their secrets."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from kngd_ray.errors import TrackingError, redact

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def is_database(uri: str) -> bool:
    """Whether MLflow opens the store itself, instead of asking a server."""
    return urlsplit(uri).scheme.split("+")[0] in _DATABASES


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other store.

    Addresses are percent-encoded. But who writes ``sqlite:///$WORKSPACE/mlflow.db`` in a folder called ``a%20b`` means
    that folder: what is there under the name as it stands is taken at its word.
    """
    written = uri.partition("///")[2].partition("?")[0]
    if not uri.startswith("sqlite:") or written.startswith("file:"):
        return None
    literal, decoded = Path(written), Path(unquote(written))
    return literal if literal.parent.is_dir() and not decoded.parent.is_dir() else decoded


def resolve_uri(uri: str, folder: Path | None = None) -> str:
    """Make a tracking address good for any process: a relative SQLite file becomes absolute.

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
        raise TrackingError(f"tracking.uri is {redact(uri)!r}, which names no host; give http://HOST:PORT.")
    if not (scheme in {"http", "https", "databricks"} or uri == "databricks" or is_database(uri)):
        raise TrackingError(
            f"tracking.uri is {redact(uri)!r}, which is not an MLflow store; "
            "give sqlite:///mlflow.db, http://HOST:PORT or a database address."
        )
    path = sqlite_file(uri)
    if path is None:
        return uri
    if str(path) in {".", "", ":memory:"}:
        raise TrackingError(f"tracking.uri is {uri!r}, which keeps nothing; name a file, as in sqlite:///mlflow.db.")
    driver, _, rest = uri.partition("///")
    query = rest.partition("?")[1:]
    absolute = str(((folder or Path.cwd()) / path).resolve())
    # SQLAlchemy decodes what it is given, and takes what follows a question mark for options
    encoded = absolute.replace("%", "%25").replace("?", "%3F")
    return f"{driver}///{encoded}{''.join(query)}"
