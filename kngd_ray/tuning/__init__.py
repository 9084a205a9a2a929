"""The search for priors: what is searched, the study on disk, the objectives of a trial. No Ray, no MLflow.

A new objective is a branch of :mod:`~kngd_ray.tuning.objective` and a name in
:data:`~kngd_ray.tuning.options.DIRECTIONS`; a new sampler is a line of :mod:`~kngd_ray.tuning.samplers`.
"""

from typing import TYPE_CHECKING

from kngd_ray._deferred import on_demand
from kngd_ray.tuning.options import SearchOptions
from kngd_ray.tuning.space import Space, Value, parse_space, plain_space

if TYPE_CHECKING:
    from kngd_ray.tuning.driver import Driver, Report, reason_of, report_of, run_here
    from kngd_ray.tuning.fitting import Fitted, fit_alone, fit_together, fitted_from
    from kngd_ray.tuning.mode import mode_of
    from kngd_ray.tuning.objective import Fitter, Workload, score_trials
    from kngd_ray.tuning.study import JOURNAL, Claimed, SearchStudy, TrialResult, load_study

__all__ = [
    "JOURNAL",
    "Claimed",
    "Driver",
    "Fitted",
    "Fitter",
    "Report",
    "SearchOptions",
    "SearchStudy",
    "Space",
    "TrialResult",
    "Value",
    "Workload",
    "fit_alone",
    "fit_together",
    "fitted_from",
    "load_study",
    "mode_of",
    "parse_space",
    "plain_space",
    "reason_of",
    "report_of",
    "run_here",
    "score_trials",
]

# Imported when they are asked for: they need torch and Optuna, and whoever reads a search file does not.
_HOMES = {
    "Claimed": "study",
    "Driver": "driver",
    "Fitted": "fitting",
    "Fitter": "objective",
    "JOURNAL": "study",
    "Report": "driver",
    "SearchStudy": "study",
    "TrialResult": "study",
    "Workload": "objective",
    "fit_alone": "fitting",
    "fit_together": "fitting",
    "fitted_from": "fitting",
    "score_trials": "objective",
    "load_study": "study",
    "mode_of": "mode",
    "reason_of": "driver",
    "report_of": "driver",
    "run_here": "driver",
}

__getattr__ = on_demand(__name__, _HOMES)
