"""A stream whose domains follow one another: process noise against none, gradient descent and a replay.

    python -m benchmarks.stream --data ../shared/data/pacs.parquet
    python -m benchmarks.stream --data ../shared/data/pacs.parquet --seeds 10 --trials 10

Each batch is predicted before it is learned from (``protocol=stream``). PACS goes from photo over art_painting, cartoon
and sketch back to photo, the package's emoji from one drawing style to the next, both as the mini CLIP encodes them and
in the geometry of OpenAI's CLIPs (``benchmarks.few_shot.geometry``). The first batch is CLIP's in
every row.

    tuned       preset kalman with the process of the best trial      q = 0       the preset as it is
    adamw, sgd  steps on each batch as it comes; learning rate, weight decay and steps a batch are tuned
    replay      the preset fitted anew on the last k samples before each batch; k is tuned

All trials see streams of other seeds than those shown, and are judged by prequential NLL there; each tuned row has as
many, ``--trials``, drawn by the same sampler. Differences are paired by seed, with 95 % intervals over seeds.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.few_shot.geometry import to_clip
from benchmarks.few_shot.problem import Case, Problem
from kngd_ray.comparison.statistics import paired_difference
from kngd_ray.config import Config, load_config, override
from kngd_ray.data import EMBEDDED
from kngd_ray.errors import FilterError
from kngd_ray.experiment.aggregate import interval
from kngd_ray.experiment.environment import describe_environment
from kngd_ray.experiment.prepared import prepare
from kngd_ray.experiment.streams import stream_of
from kngd_ray.experiment.task import open_task
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import predictor_of
from kngd_ray.training.fit import FitTask, StepRecord, fit
from kngd_ray.training.stream import Foresight, Look, Met, Stream, accuracies, prequential, retention

ORDERS = {
    "pacs": ["photo", "art_painting", "cartoon", "sketch", "photo"],
    "emoji": ["noto", "twemoji", "fluent-3d", "openmoji", "fluent-flat", "openmoji-black"],
}
SHOTS = {"pacs": 16, "emoji": 4}
TUNED_ON = (100, 101)  # seeds of the streams that trials see
ROWS = ("tuned", "q = 0", "adamw", "sgd", "replay")
COLOURS = {"tuned": "#1f5f9e", "q = 0": "#7fb3d5", "adamw": "#d1752b", "sgd": "#b5a642", "replay": "#4d9e5f"}
LONGEST = 20  # batches without which a window is all that came

Settings = dict[str, Any]


@dataclass(frozen=True)
class Ordered:
    """A stream of one seed: its samples in order, and what makes it a stream."""

    task: FitTask
    stream: Stream


@dataclass(frozen=True)
class Run:
    """How a method went through a stream."""

    met: Sequence[Met]
    looks: Sequence[Look]

    def figures(self, stream: Stream) -> dict[str, float]:
        """Prequential accuracy and NLL, and forgetting."""
        return {**prequential(self.met), **retention(stream.stages, self.looks)}


def main() -> None:
    """Tune, run all rows on all seeds, print the table, write figure and numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="PACS as a parquet file of the package's schema; without it, emoji alone")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept: dict[str, Any] = {"environment": json.loads(describe_environment())}
    kept |= {"seeds": options.seeds, "trials": options.trials, "tuned_on": TUNED_ON, "problems": {}}
    for path in [*([options.data] if options.data else []), EMBEDDED]:
        for geometry in ("mini", "clip"):
            began = time.monotonic()
            name, problem = measured(path, geometry, options.seeds, options.trials)
            kept["problems"][name] = problem
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "stream.json").write_text(json.dumps(kept, indent=1) + "\n")
            print(f"\n{name} ({time.monotonic() - began:.0f} s)\n\n{markdown(problem)}", flush=True)
    draw(kept["problems"], options.out / "stream.png")


def measured(path: str, geometry: str, seeds: int, trials: int) -> tuple[str, dict[str, Any]]:
    """All rows of one problem."""
    data = "emoji" if path == EMBEDDED else "pacs"
    shown = [*TUNED_ON, *range(1, seeds + 1)]
    streams = load(path, data, geometry, shown)
    config = load_config()
    runs: dict[str, list[Run]] = {}
    chosen: dict[str, Settings] = {}
    seconds: dict[str, float] = {}
    for row in ROWS:
        space, run = METHODS[row]
        if space is not None:
            chosen[row] = tuned(space, run, config, [streams[seed] for seed in TUNED_ON], trials)
        settings = chosen.get(row, {})
        began = time.process_time()
        runs[row] = [run(config, streams[seed], settings) for seed in shown[len(TUNED_ON) :]]
        seconds[row] = (time.process_time() - began) / seeds
    figures = {row: [r.figures(streams[1].stream) for r in found] for row, found in runs.items()}
    return f"{data}, {geometry}", {
        "order": ORDERS[data],
        "shots": SHOTS[data],
        "chosen": chosen,
        "cpu_seconds": seconds,
        "by_seed": figures,
        "rows": {row: {key: interval([f[key] for f in found]) for key in found[0]} for row, found in figures.items()},
        "tuned_minus": {row: differences(figures["tuned"], figures[row]) for row in ROWS[1:]},
        "curves": {
            "samples": np.cumsum([met.size for met in runs["tuned"][0].met]).tolist(),
            **{
                row: {
                    key: np.mean([[getattr(met, key) for met in r.met] for r in found], 0).round(4).tolist()
                    for key in ("accuracy", "nll")
                }
                for row, found in runs.items()
            },
        },
    }


def load(path: str, data: str, geometry: str, seeds: Sequence[int]) -> dict[int, Ordered]:
    """The streams of some seeds, features encoded once."""
    order = f"data.order=[{','.join(ORDERS[data])}]"
    settings = [f"data.path={path}", "protocol=stream", order, f"data.shots={SHOTS[data]}"]
    prepared = prepare(open_task(load_config(overrides=[*settings, f"seeds={list(seeds)}"])))
    texts, scale = prepared.class_embeddings, prepared.model.logit_scale
    options = prepared.config.fit_options
    found = {}
    for seed in seeds:
        stream = stream_of(prepared, seed)
        assert stream is not None
        problem = Problem([Case(prepared.support(seed), stream.tests, seed)], texts, scale)
        if geometry == "clip":
            problem = to_clip(problem)
        (case,) = problem.cases
        stream = replace(stream, tests=dict(case.tests))
        task = FitTask(options, seed, case.support, problem.class_embeddings, problem.logit_scale, stream=stream)
        found[seed] = Ordered(task, stream)
    return found


def learned(config: Config, sequence: Ordered, settings: Settings) -> Run:
    """A run of the package's own."""
    options = override(config, {"protocol": "stream", "data.order": ["any"], **settings}).fit_options
    records: list[StepRecord] = []
    fit(replace(sequence.task, options=options), on_step=records.append)
    return Run(
        [record.met for record in records if record.met is not None],
        [record.look for record in records if record.look is not None],
    )


def gradient(method: str) -> Callable[[Config, Ordered, Settings], Run]:
    """Steps of a gradient method on each batch as it comes."""

    def run(config: Config, sequence: Ordered, settings: Settings) -> Run:
        own = load_config(overrides=[f"method={method}", "adapter=class_residual", "batch_size=0"])
        return learned(own, sequence, settings)

    return run


def replayed(config: Config, sequence: Ordered, settings: Settings) -> Run:
    """The preset fitted anew before each batch, on the last samples; tau as a stream chooses it."""
    task, stream = sequence.task, sequence.stream
    options, window = config.fit_options, settings["window"]
    sampler = task.sampler
    foresight = Foresight(stream)
    met: list[Met] = []
    looks: list[Look] = []
    zero_shot = fit(replace(task, options=replace(options, epochs=0), support=part(task.support, 0, 0), stream=None))
    method = zero_shot
    for step in range(sampler.steps):
        batch, before = sampler.batch(step), sampler.before(step)
        after = before + batch.total
        if step == 0:
            logits = task.logit_scale * batch.inputs @ task.class_embeddings.mT
            told = [score(logits.softmax(1), batch.labels)]
        else:
            predictor = predictor_of(method, config.posterior)
            found = [predictor.predict(batch.inputs, tau).probabilities for tau in stream.taus]
            told = [score(p, batch.labels) for p in found]
            logits = found[0]
        tau = foresight.tau
        right = float((logits.argmax(1) == batch.labels).double().mean())
        met.append(Met(batch.total, right, -foresight.see(told, batch.total) / batch.total, tau))
        try:
            seen = part(task.support, max(0, after - window), after)
            method = fit(replace(task, options=options, support=seen, stream=None))
        except FilterError:  # the belief is kept
            pass
        if stream.looks(before, after, len(task.support)):
            looks.append(Look(after, accuracies(method, {k: as_support(v) for k, v in stream.tests.items()})))
    return Run(met, looks)


def part(support: Any, start: int, stop: int) -> Support:
    """Samples of a stream, by number."""
    found = support.subset(torch.arange(start, stop))
    assert isinstance(found, Support)
    return found


def as_support(tests: Any) -> Support:
    """Test samples as features."""
    assert isinstance(tests, Support)
    return tests


def score(p: Tensor, labels: Tensor) -> float:
    """Log-probability of labels, nats."""
    return float(p.double().clamp_min(1e-12).gather(1, labels.unsqueeze(1)).log().sum())


def process(trial: optuna.Trial) -> Settings:
    """The process model and its number."""
    kind = trial.suggest_categorical("process", ["none", "drift", "ornstein_uhlenbeck", "forgetting"])
    if kind == "none":
        return {}
    if kind == "drift":
        return {"noise.process.drift": trial.suggest_float("drift", 1e-4, 3.0, log=True)}
    name, low = ("gamma", 0.85) if kind == "ornstein_uhlenbeck" else ("factor", 0.8)
    rate = {} if kind == "ornstein_uhlenbeck" else {"noise.process.rate": 1.0}
    return {"noise.process": kind, f"noise.process.{name}": trial.suggest_float(name, low, 1.0), **rate}


def descent(low: float, high: float) -> Callable[[optuna.Trial], Settings]:
    """Learning rate, weight decay, and steps a batch."""
    return lambda trial: {
        "optimizer.lr": trial.suggest_float("lr", low, high, log=True),
        "optimizer.weight_decay": trial.suggest_float("weight_decay", 1e-5, 0.1, log=True),
        "epochs": trial.suggest_int("steps", 1, 10, log=True),
    }


def windows(trial: optuna.Trial) -> Settings:
    """How much is replayed."""
    return {"window": trial.suggest_int("window", 16, 16 * LONGEST * 2, log=True)}


Space = Callable[[optuna.Trial], Settings]
METHODS: dict[str, tuple[Space | None, Callable[[Config, Ordered, Settings], Run]]] = {
    "tuned": (process, learned),
    "q = 0": (None, learned),
    "adamw": (descent(1e-4, 1e-1), gradient("adamw")),
    "sgd": (descent(1e-5, 1e-1), gradient("sgd")),
    "replay": (windows, replayed),
}


def tuned(
    space: Space,
    run: Callable[[Config, Ordered, Settings], Run],
    config: Config,
    streams: Sequence[Ordered],
    trials: int,
) -> Settings:
    """The settings with the best prequential NLL, a mean over streams that are not shown."""
    found: list[Settings] = []

    def objective(trial: optuna.Trial) -> float:
        settings = space(trial)
        found.append(settings)
        nll = float(np.mean([prequential(run(config, stream, settings).met)["nll"] for stream in streams]))
        return nll if np.isfinite(nll) else 1e3

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=max(trials // 2, 1)))
    if space is process:
        study.enqueue_trial({"process": "none"})  # the preset, with which a search begins
    study.optimize(objective, n_trials=trials, catch=(FilterError,))
    return found[study.best_trial.number]


def differences(mine: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Paired by seed: mean, 95 % interval, wins and losses."""
    found = {}
    for key in mine[0]:
        sign = -1 if key in ("nll", "forgetting") else 1
        a, b = ({n: figures[key] for n, figures in enumerate(rows)} for rows in (mine, other))
        difference = paired_difference(a, b, sign)
        assert difference is not None
        told = {name: getattr(difference, name) for name in ("mean", "low", "high", "wins", "losses")}
        found[key] = told
    return found


def markdown(problem: Mapping[str, Any]) -> str:
    """A table of all rows, and of what tuned process noise is better by."""
    lines = [
        "| | accuracy % | NLL | forgotten % | CPU s | tuned minus it: accuracy | NLL |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        own, by = problem["rows"][row], problem["tuned_minus"].get(row)
        cells = [shown(own["accuracy"], 100), shown(own["nll"]), shown(own["forgetting"], 100)]
        cells.append(f"{problem['cpu_seconds'][row]:.1f}")
        cells += ["", ""] if by is None else [span(by["accuracy"], 100), span(by["nll"])]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"chosen: {problem['chosen']}"])


def shown(figure: Mapping[str, float], factor: float = 1) -> str:
    """Mean and half of its interval."""
    digits = 1 if factor == 100 else 3
    half = (figure["high"] - figure["low"]) / 2
    return f"{factor * figure['mean']:.{digits}f} ± {factor * half:.{digits}f}"


def span(figure: Mapping[str, float], factor: float = 1) -> str:
    """A difference with its interval, wins and losses."""
    digits = 1 if factor == 100 else 3
    mean, low, high = (f"{factor * figure[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}], {figure['wins']}:{figure['losses']}"


def draw(problems: Mapping[str, Any], path: Path) -> None:
    """Accuracy and NLL over the stream, means over seeds, smoothed over three batches."""
    figure = Figure(figsize=(9.0, 2.3 * len(problems)), layout="constrained")
    grid = figure.subplots(len(problems), 2, squeeze=False)
    for axes, (name, problem) in zip(grid, problems.items(), strict=True):
        curves, order = problem["curves"], problem["order"]
        at = np.array(curves["samples"])
        for ax, key in zip(axes, ("accuracy", "nll"), strict=True):
            for row in ROWS:
                values = np.array(curves[row][key]) * (100 if key == "accuracy" else 1)
                smooth = np.convolve(np.pad(values, 1, mode="edge"), np.ones(3) / 3, "valid")
                ax.plot(at, smooth, color=COLOURS[row], linewidth=1.2, label=row)
            for n, domain in enumerate(order):
                end = at[-1] * (n + 1) / len(order)
                ax.axvline(end, color="0.7", linewidth=0.7, linestyle=":")
                ax.annotate(domain, (end, 0.02), xycoords=("data", "axes fraction"), ha="right", fontsize=5.5)
            ax.set_title(f"{name}: {'accuracy %' if key == 'accuracy' else 'NLL'}", fontsize=8, loc="left")
            ax.tick_params(labelsize=6)
            ax.spines[["top", "right"]].set_visible(False)
        axes[1].set_ylim(0, 1.1 * max(max(curves[row]["nll"]) for row in ("q = 0", "tuned", "replay")))
    grid[0][0].legend(fontsize=6, frameon=False)
    figure.suptitle("each batch predicted before it is learned from", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
