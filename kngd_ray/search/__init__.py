"""The search for priors: what is searched, the study on disk, what a trial is judged by. No Ray, no MLflow.

A new objective is a branch of :mod:`~kngd_ray.search.objective` and a name in
:data:`~kngd_ray.search.options.DIRECTIONS`; a new sampler is a line of :mod:`~kngd_ray.search.samplers`.
"""

from kngd_ray.search.driver import Driver, reason_of, report_of, run_here
from kngd_ray.search.fitting import Fitted, fit_alone, fit_together, fitted_from
from kngd_ray.search.mode import mode_of
from kngd_ray.search.objective import Fitter, Workload, judge
from kngd_ray.search.options import SearchOptions
from kngd_ray.search.space import Space, Value, parse_space, plain_space
from kngd_ray.search.study import JOURNAL, Claimed, SearchStudy, TrialResult

__all__ = [
    "JOURNAL",
    "Claimed",
    "Driver",
    "Fitted",
    "Fitter",
    "SearchOptions",
    "SearchStudy",
    "Space",
    "TrialResult",
    "Value",
    "Workload",
    "fit_alone",
    "fit_together",
    "fitted_from",
    "judge",
    "mode_of",
    "parse_space",
    "plain_space",
    "reason_of",
    "report_of",
    "run_here",
]
