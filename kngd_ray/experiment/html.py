"""HTML pages that a command writes: jinja2 templates with autoescape, in one file that requests nothing."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kngd_ray.errors import StorageError, UsageError

_SUFFIXES = (".html", ".htm")


def check_path(path: Path, option: str) -> None:
    """Refuse a path that no page can be written to, before anything is computed; an existing page is replaced.

    Args:
        path: of the page.
        option: that names it.

    Raises:
        UsageError: it does not end in ``.html``, or is a folder.
        StorageError: its folder is missing.
    """
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        raise UsageError(f"{option} {path} is not an HTML file: give a name that ends in .html.")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"cannot write {path}: there is no folder {path.absolute().parent}.")


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
