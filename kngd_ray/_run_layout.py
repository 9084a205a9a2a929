"""What lies where in the folder of a run.

<storage_path>/<name>/config.yaml         the configuration, as ``--resume`` reads it
                      fits/<fit>/         checkpoints and calibration of each fit
                      records/            what is logged, see :mod:`kngd_ray.tracking`
                      results.json        the final figures
                      search.yaml         of a search: its options, space and first trials
                      estimator.json      of a saved KalmanCLIP: its labels and parameters
"""

DEFAULT_STORAGE = "kngd_runs"  # of ``trainer.storage_path``
CONFIG = "config.yaml"
FITS = "fits"
RESULTS = "results.json"
SEARCH = "search.yaml"
ESTIMATOR = "estimator.json"
IN_MEMORY = "in-memory"  # data.path of what learned from no file


def fit_name(method: str, seed: int) -> str:
    """What a fit is called in its run."""
    return f"{method}-seed{seed}"


SUBMITTED = "KNGD_SUBMITTED"  # variable of the jobs of `kngd-ray submit`, whose working folder goes when they end
