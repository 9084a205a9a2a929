"""What the package does, as functions; ``import kngd_ray`` shows them, and the command line calls them.

Every keyword is a setting: ``shots=16`` is ``data.shots=16`` on the command line, see
:func:`kngd_ray._keywords.settings_of`. The same settings give the same result in both. A wrong one raises a
:class:`kngd_ray.errors.KngdError` whose message is the sentence that the command line prints.
"""

from kngd_ray.api.files import encode, ensemble, export, sync
from kngd_ray.api.machines import doctor
from kngd_ray.api.runs import compare, evaluate, load, predict, train, tune

__all__ = [
    "compare",
    "doctor",
    "encode",
    "ensemble",
    "evaluate",
    "export",
    "load",
    "predict",
    "sync",
    "train",
    "tune",
]
