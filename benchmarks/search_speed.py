"""Trials a minute of a search whose trials are Ray Train jobs, light, or batched; and whether they say the same.

    python -m benchmarks.search_speed --data pacs.parquet --domain photo

The same search is run in each mode by ``kngd-ray tune`` on the cores of this machine, with cached features: a trial is
the evidence of a prior on three support sets. Rates are taken from the first result to the last, so that starting Ray
and its first processes, which a search pays once, is shown apart. Trials of one number have the same prior in
every mode.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from kngd_ray.experiment.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
SEARCH = """
method: kalman
preset: kalman_diagonal
observation: log_likelihood,cosine
search: {{objective: {objective}, batch: {batch}, seeds: [0, 1, 2], sampler: random, refit: false}}
space:
  filter.logit_variance: {{low: 0.3, high: 300.0, log: true}}
  observation.0.r0: {{low: 0.03, high: 10.0, log: true}}
  observation.1.r0: {{low: 0.03, high: 10.0, log: true}}
  noise.process.q: {{low: 1.0e-8, high: 1.0e-2, log: true}}
"""
MODES = {"train": (6, 2), "local": (120, 20), "batched": (480, 64)}  # trials, and those asked for at once


def run(mode: str, objective: str, settings: list[str], folder: Path) -> dict[str, Any]:
    """One search; its rate from result to result, and its objectives by trial."""
    trials, batch = MODES[mode]
    file, name = folder / f"{mode}-{objective}.yaml", f"{mode}-{objective}"
    file.write_text(SEARCH.format(objective=objective, batch=batch))
    began = time.monotonic()
    own = [
        f"search.trial={mode}",
        f"search.num_samples={trials}",
        f"trainer.storage_path={folder}",
        f"trainer.name={name}",
        "tracking.enabled=false",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "kngd_ray.cli", "tune", str(file), *own, *settings, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = time.monotonic() - began
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(folder / name / "study.journal")))
    found = optuna.load_study(study_name=name, storage=storage).trials
    ends = sorted(trial.datetime_complete for trial in found)
    first = sum(end == ends[0] for end in ends)
    first = max(first, batch if mode == "batched" else 1)  # the first batch is what loads the processes
    rate = (trials - first) / (ends[-1] - ends[first - 1]).total_seconds() * 60
    return {
        "mode": mode,
        "objective": objective,
        "trials": trials,
        "trials_per_minute": round(rate, 1),
        "seconds_in_all": round(seconds, 1),
        "values": {trial.number: trial.values[0] for trial in found if trial.values},
    }


def main() -> None:
    """Run all modes and objectives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--domain")
    parser.add_argument("--shots", type=int, default=16)
    args = parser.parse_args()
    # features as they are: nine views of each shot take a trial as much longer as they take a fit
    settings = [f"data.path={Path(args.data).resolve()}", f"data.shots={args.shots}", "tune.views=0"]
    if args.domain:
        settings.append(f"data.train_domain={args.domain}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for objective in ("evidence", "held_out_nll"):
            for mode in MODES:
                rows.append(run(mode, objective, settings, Path(folder)))
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "values"}), flush=True)
    apart = {}
    for objective in ("evidence", "held_out_nll"):
        one, *others = (row.pop("values") for row in rows if row["objective"] == objective)
        apart[objective] = max(abs(other[n] - value) for other in others for n, value in one.items())
    result = {
        "data": Path(args.data).stem,
        "shots": args.shots,
        "searches": rows,
        "largest_difference_between_modes": apart,
        "environment": json.loads(describe_environment()),
    }
    (RESULTS / "search_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(apart))


if __name__ == "__main__":
    main()
