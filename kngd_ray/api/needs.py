"""What each command needs, from the arguments that its function takes; ``kngd-ray doctor -- COMMAND`` checks it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kngd_ray.api.settings import configured, configured_encoding, configured_search, split

if TYPE_CHECKING:
    from kngd_ray.cluster.doctor.needs import Needs
    from kngd_ray.config import Config


def needs_of(command: str, given: Mapping[str, Any]) -> "Needs":
    """What a command needs.

    Args:
        command: its name.
        given: the arguments of its function in :mod:`kngd_ray.cli`, by name.

    Returns:
        Its needs; none for a command that takes no configuration.
    """
    from kngd_ray.cluster.doctor.needs import Needs, needs_of_run

    outputs: dict[str, Path | None] = {f"--{n}": given[n] for n in ("out", "html") if given.get(n) is not None}
    if command == "compare" and not outputs:
        outputs = {"compare without --out": None}
    Needs(outputs=outputs).check_kept()
    settings, resume = given.get("settings") or [], given.get("resume")
    match command:
        case "train":
            return needs_of_run(configured(None, settings, resume), resumed=resume is not None)
        case "tune":
            return needs_of_run(configured_search(None, settings, resume).config, resumed=resume is not None)
        case "encode":
            needs = needs_of_run(configured_encoding(given["dataset"], *split(None, settings)), writes=False)
        case "evaluate" | "ensemble":
            preset, overrides = split(None, settings if command == "evaluate" else [])
            needs = replace(needs_of_run(_fit(given, overrides, preset), resumed=True, writes=False), writes_runs=True)
        case "export" | "predict":
            needs = needs_of_run(_fit(given), resumed=True, writes=False)
            inputs = {path: name for path, name in needs.inputs.items() if name.startswith("model.")}
            needs = replace(needs, inputs=inputs | dict.fromkeys(given.get("images", ()), "IMAGE"))
        case _:
            needs = Needs()
    return replace(needs, outputs=outputs)


def _fit(given: Mapping[str, Any], overrides: list[str] | None = None, file: Any = None) -> "Config":
    """The configuration of the fit that a command takes."""
    from kngd_ray.cluster.doctor.needs import config_of_fit

    return config_of_fit(given["target"], given["storage_path"], overrides or (), None if file is None else Path(file))
