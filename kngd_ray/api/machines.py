"""Check what a run needs of this machine and of the cluster."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kngd_ray._keywords import settings_of
from kngd_ray.api.settings import Named, configured, console_of, in_process, split
from kngd_ray.console import Display

if TYPE_CHECKING:
    import pandas as pd

    from kngd_ray.cluster.doctor.needs import Needs


def doctor(
    preset: Named | Mapping[str, Any] | None = None,
    *overrides: str,
    ray: bool = False,
    quiet: bool = False,
    console: Display | None = None,
    **settings: Any,
) -> "pd.DataFrame":
    """Check whether a run with these settings would work, here and on the cluster.

    ::

        found = kngd_ray.doctor("kalman", data="pacs.parquet", ray=True)
        found.query("state == 'failed'")

    Args:
        preset: as :func:`train` takes it.
        *overrides: as :func:`train` takes them.
        ray: join or start Ray, and check every node.
        quiet: show nothing.
        console: where the table is shown; None is a new one.
        **settings: as :func:`train` takes them.

    Returns:
        A pandas frame with a row for each check: ``check``, ``where`` (a node, or ``here``), ``state`` (``ok``,
        ``warning``, ``failed`` or ``skipped``), ``found`` and ``advice``.
    """
    import pandas as pd

    from kngd_ray.cluster.doctor.needs import needs_of_run

    preset, given = split(preset, [*overrides, *settings_of(settings)])
    config = configured(preset, in_process(given, preset, ray=ray))
    return pd.DataFrame(checks(needs_of_run(config), console_of(console, quiet))["checks"])


def checks(needs: "Needs", console: Display) -> dict[str, Any]:
    """The checks of :func:`doctor` as plain data, which ``kngd-ray doctor --json`` prints."""
    from kngd_ray.cluster.doctor.run import doctor as run

    return run(needs, console)
