"""What the gallery shows of an example: the figure that it has drawn, without pyplot, under the name ``figure``."""

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

_shown: set[int] = set()


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save a figure that a block has drawn.

    Args:
        block: of the example.
        block_vars: its variables.
        gallery_conf: of the gallery.

    Returns:
        reStructuredText that shows the figure; nothing where there is none, or it was shown before.
    """
    figure = block_vars["example_globals"].get("figure")
    if not isinstance(figure, Figure) or id(figure) in _shown:
        return ""
    _shown.add(id(figure))
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=150)
    shown: str = figure_rst([path], gallery_conf["src_dir"])
    return shown
