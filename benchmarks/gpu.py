"""What one GPU makes of the package: its tests there, and times beside those of AdamW, in under eight minutes.

    make gpu                                       all of it, into benchmarks/results/gpu.json
    python -m benchmarks.gpu --device cpu --quick  the same path with small sizes, where there is no GPU

Four parts, one after another, each of which is left out once its time is up ::

    tests       tests/training/test_on_a_device.py on the device: fits, calibration, predictions; nccl on one rank
    step_cost   the main cases: a step of each filter as a multiple of AdamW's
    tower_cost  ViT-B/32 and ViT-B/16, batch 32, towers in bfloat16 and P in float32: time and memory of a step
    few_shot    accuracy and seconds of fit, tau and predictions on one data set, on the device and on the CPU

It ends with 1 where a test has failed or a bar was missed, and with 2 where there is no such device.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.few_shot.data import DataSet
from benchmarks.step_cost.__main__ import on_device
from benchmarks.step_cost.report import environment
from benchmarks.tower_cost.__main__ import measured as towers
from benchmarks.tower_cost.cases import Case
from kngd_ray.config import load_config
from kngd_ray.training.calibration import predictor_of
from kngd_ray.training.evaluation import ID, evaluate
from kngd_ray.training.fit import FitTask, fit
from kngd_ray.training.novelty import calibrate_and_compare

_ROOT = Path(__file__).parents[1]
_FILE = "gpu.json"
_TESTS = "tests/training/test_on_a_device.py"
_MINUTES = 7.5  # in which the last part has begun and ended; the rest of eight is for imports
# multiples of AdamW's step; of a head's step by the filter of the preset `kalman_diagonal`
BARS = {"head_time": 1.2, "tower_time": 1.5, "tower_memory": 1.2}
Line = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        tests: what pytest is told beside the file.
        seconds: of steps of a head's case.
        cases: how many cases of heads.
        models: whose towers are trained.
        batch: pictures of a step.
        precision: of the towers.
        methods: on towers.
        rounds: steps of each method that count.
        shots: of a class.
        seeds: support sets.
    """

    tests: tuple[str, ...] = ()
    seconds: float = 1.0
    cases: int | None = None
    models: tuple[str, ...] = ("ViT-B-32", "ViT-B-16")
    batch: int = 32
    precision: str = "bfloat16"
    methods: tuple[str, ...] = ("adamw", "ekf", "vdekf", "ekf-4")
    rounds: int = 5
    shots: tuple[int, ...] = (1, 4, 16)
    seeds: int = 3


QUICK = Sizes(
    tests=("-k", "random_signs or ranks"),
    seconds=0.05,
    cases=1,
    models=("small-vit",),
    batch=2,
    precision="float32",
    methods=("adamw", "ekf"),
    rounds=1,
    shots=(1,),
    seeds=1,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write.

    Args:
        arguments: of the command line.

    Returns:
        0, or 1 where a test has failed or a bar was missed, or 2 where there is no such device.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--data", default="embedded", help="data set of few_shot: embedded, or a parquet file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help=f"folder of {_FILE}")
    options = parser.parse_args(arguments)
    lacking = missing(options.device)
    if lacking is not None:
        print(lacking, file=sys.stderr)
        return 2
    sizes, device, before = QUICK if options.quick else Sizes(), options.device, environment()
    found = run(
        {
            "tests": lambda: tested(device, sizes),
            "step_cost": lambda: list(on_device(device, quick=True, seconds=sizes.seconds, cases=sizes.cases)),
            "tower_cost": lambda: [line for model in sizes.models for line in of_towers(model, device, sizes)],
            "few_shot": lambda: list(few_shot(options.data, device, sizes)),
        },
        60 * _MINUTES,
    )
    bars = judged(found)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / _FILE
    path.write_text(json.dumps({"environment": before, "device": device, "bars": bars, **found}, indent=1) + "\n")
    for name, bar in bars.items():
        print(f"{name}: {bar['found']:.2f} times AdamW's, {bar['most']} at most", file=sys.stderr)
    print(f"wrote {path}", file=sys.stderr)
    sound = found["tests"]["result"] is not None and found["tests"]["result"]["code"] == 0
    # on a CPU the times are another benchmark's to judge
    return 0 if sound and (device == "cpu" or all(bar["met"] for bar in bars.values())) else 1


def missing(device: str) -> str | None:
    """What a device lacks to be measured.

    Args:
        device: ``cuda`` or ``cpu``.

    Returns:
        A sentence; None where nothing is missing.
    """
    if device == "cpu" or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"make gpu needs a PyTorch with CUDA, and this one ({torch.__version__}) was built without it."
    return (
        f"make gpu needs an NVIDIA GPU and its driver, and PyTorch {torch.__version__} (CUDA {torch.version.cuda}) "
        "finds none on this machine."
    )


def run(parts: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Line]:
    """Run parts in order, as long as there is time.

    Args:
        parts: by name.
        seconds: for all of them; a part that begins later is left out.

    Returns:
        For each its result, None where it was left out or failed, why it did, and its seconds.
    """
    start, found = perf_counter(), {}
    for name, part in parts.items():
        began, result, reason = perf_counter(), None, None
        print(f"{name} ...", file=sys.stderr, flush=True)
        if began - start > seconds:
            reason = f"left out: {seconds:.0f} s had passed"
        else:
            try:
                result = part()
            except Exception as error:  # what comes after it is worth knowing all the same
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            print(f"{name}: {reason}", file=sys.stderr)
        found[name] = {"result": result, "reason": reason, "seconds": round(perf_counter() - began, 1)}
    return found


def tested(device: str, sizes: Sizes) -> Line:
    """The tests of devices, on this one.

    Args:
        device: that they compute on.
        sizes: which of them.

    Returns:
        Exit code, and how many passed, failed and were skipped.
    """
    command = [sys.executable, "-m", "pytest", _TESTS, "-q", "-n0", "-p", "no:cacheprovider", *sizes.tests]
    ended = subprocess.run(
        command, cwd=_ROOT, env=os.environ | {"KNGD_TEST_DEVICE": device}, capture_output=True, text=True, check=False
    )
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", ended.stdout)}
    if ended.returncode:
        print(ended.stdout[-4000:], ended.stderr[-2000:], file=sys.stderr)
    return {"code": ended.returncode, **counts}


def of_towers(model: str, device: str, sizes: Sizes) -> Iterator[Line]:
    """Time and memory of a step on the towers of a model.

    Args:
        model: of open_clip, or one of ``tower_cost``.
        device: where.
        sizes: batch, precision, methods and rounds.

    Yields:
        A line for each method.
    """
    case = Case(model, sizes.batch, sizes.precision, device)
    yield from towers(case, sizes.methods, torch.get_num_threads(), sizes.rounds, 1)


def few_shot(data: str, device: str, sizes: Sizes) -> Iterator[Line]:
    """Fits, tau and predictions on one data set, by the default and by AdamW.

    Args:
        data: ``embedded``, or a parquet file of pictures.
        device: beside the CPU.
        sizes: shots and support sets.

    Yields:
        A line for each method, number of shots and device: means over the support sets.
    """
    images = DataSet(data)
    domain = images.domains[0]
    for shots in sizes.shots:
        problem = images.problem(domain, shots, range(sizes.seeds))
        for method in ("kalman", "adamw"):
            config = load_config(overrides=[f"method={method}"])
            for where in dict.fromkeys((device, "cpu")):
                figures = []
                for number, case in enumerate([problem.cases[0], *problem.cases]):
                    task = problem.task(case, config.fit_options)
                    line = _fitted(task, case.tests, config.posterior, where)
                    if number:  # the first loads libraries
                        figures.append(line)
                means = {key: sum(line[key] for line in figures) / len(figures) for key in figures[0]}
                yield {"data": images.name, "shots": shots, "method": method, "device": where, **means}


def _fitted(task: FitTask, tests: Mapping[str, Any], posterior: Any, device: str) -> dict[str, float]:
    """One fit with all that comes after it: its figures, and the seconds of the three parts."""
    times = [_now(device)]
    done = fit(task, device=device)
    times.append(_now(device))
    calibration, _ = calibrate_and_compare(task, posterior, device, done.state())
    times.append(_now(device))
    scores = evaluate(predictor_of(done, posterior), tests, calibration).plain[ID]
    times.append(_now(device))
    fitting, choosing, predicting = (stop - start for start, stop in pairwise(times))
    return {
        "accuracy": scores.accuracy,
        "nll": scores.nll,
        "fit_seconds": fitting,
        "tau_seconds": choosing,
        "predict_seconds": predicting,
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def judged(found: Mapping[str, Line]) -> dict[str, Line]:
    """What was asked of the times, and what came of it.

    Args:
        found: of :func:`run`.

    Returns:
        By bar the worst multiple of AdamW's that was found, the most that it may be, and whether it is met. Bars of
        parts that gave nothing are left out.
    """
    heads = [line["x_adamw"] for line in found["step_cost"]["result"] or () if line["method"] == "diagonal ekf"]
    # the bar is that of the largest tower: it comes last
    lines = found["tower_cost"]["result"] or [{"model": None}]
    largest = [line for line in lines if line["model"] == lines[-1]["model"] and line.get("method") == "ekf"]
    worst = {
        "head_time": heads,
        "tower_time": [line["x_adamw"] for line in largest],
        "tower_memory": [line["peak_x_adamw"] for line in largest],
    }
    return {
        name: {"found": max(values), "most": BARS[name], "met": max(values) <= BARS[name]}
        for name, values in worst.items()
        if values
    }


if __name__ == "__main__":
    sys.exit(main())
