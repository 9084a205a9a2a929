"""HTML pages that a command writes: jinja2 templates with autoescape, in one file that requests nothing."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kngd_ray.errors import StorageError, UsageError
from kngd_ray.storage import storage_errors

_SUFFIXES = (".html", ".htm")
_GENERATOR = b'<meta name="generator" content="kngd-ray'  # in every template
_HEAD = 1024  # bytes of a page that hold it


def check_path(path: Path, option: str) -> None:
    """Refuse a path that no page can be written to, before anything is computed.

    An existing page is replaced if this package wrote it; any other file is kept.

    Args:
        path: of the page.
        option: that names it.

    Raises:
        UsageError: it does not end in ``.html``, is a folder, or is a file that this package did not write.
        StorageError: its folder is missing, or the file there cannot be read.
    """
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        raise UsageError(f"{option} {path} is not an HTML file: give a name that ends in .html.")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"cannot write {path}: there is no folder {path.absolute().parent}.")
    if not path.exists():
        return
    start = b"-"  # of a device or a pipe, which nobody should replace either
    if path.is_file():
        with storage_errors(path), path.open("rb") as file:
            start = file.read(_HEAD)
    if start and _GENERATOR not in start:
        raise UsageError(f"{option} {path} is a file that kngd-ray did not write: give another name, or remove it.")


def render(template: str, **values: Any) -> str:
    """Fill in a template.

    Args:
        template: name of a file in ``assets``.
        **values: its variables; strings are escaped.

    Returns:
        HTML.
    """
    return _environment().get_template(template).render(**values)


def read_asset(name: str) -> str:
    """The text of a file in ``assets``."""
    return (resources.files("kngd_ray") / "assets" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("kngd_ray", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
