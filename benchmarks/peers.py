"""Kalman beside other ways to a posterior: Laplace (laplace-torch) and IVON (ivon-opt), on the same frozen features.

    python -m benchmarks.peers                                             the emoji that come along
    python -m benchmarks.peers --data pacs.parquet --domain photo --shots 16
    python -m benchmarks.peers --markdown                                  put the tables of results/ into README.md

All methods train the same weights from the same start: a residual on each class's text embedding, by which CLIP's
zero-shot classifier becomes a trainable linear one. In units of logits that is ::

    logits = s z T^T + z Delta'^T,    Delta' = s Delta = 0 at the start

with s the logit scale and T the class embeddings, an ``nn.Linear`` without bias over frozen features z beside the
constant zero-shot logits: the form that laplace-torch and IVON are given. A zero-mean prior on Delta' is then a prior
around the zero-shot classifier for them too, as it is for Kalman.

adamw, kalman     the presets; kalman's tau by cross-validation over the training shots, as in ``kngd-ray train``
kalman diagonal   the same of the preset ``kalman_diagonal``
laplace ...       around AdamW's solution, generalised Gauss-Newton; the prior's precision by marginal likelihood on the
                  training shots, prediction by the probit approximation of the linearised model
ivon              from the start; step size, effective sample size and initial Hessian by the NLL of held-out training
                  shots, in the folds that choose Kalman's tau; prediction by the mean over as many draws

No choice sees a test picture. Times are those of one fit, and of choosing its hyperparameters on top; memory is the
peak of the tensors that a fit allocates.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from ivon import IVON
from laplace import Laplace
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.few_shot.probe import Probe
from benchmarks.step_cost.memory import allocated
from benchmarks.step_cost.report import environment, fill
from kngd_ray.config import load_config
from kngd_ray.console import with_interval
from kngd_ray.experiment.aggregate import over_seeds
from kngd_ray.experiment.prepared import TaskData, prepare
from kngd_ray.experiment.task import open_task
from kngd_ray.training.batches import BatchSampler
from kngd_ray.training.calibration import Calibration, calibrate, predictor_of
from kngd_ray.training.evaluation import ID
from kngd_ray.training.fit import FitTask, build_head, fit
from kngd_ray.training.folds import fold_of
from kngd_ray.training.metrics import Scores
from kngd_ray.training.predict import PosteriorOptions

Predict = Callable[[Tensor], Tensor]  # (m, d) features to (m, C) probabilities
_Settings = tuple[float, float, float]
_RESULTS = Path(__file__).parent / "results"
# step size, effective sample size in shots, initial Hessian of the mean loss (whose memory is long against a short fit)
_IVON_GRID = list(product((1.0, 3.0, 10.0, 30.0), (1.0, 10.0, 100.0), (0.03, 0.1, 0.3)))
_CHUNK = 64  # samples whose Jacobian laplace-torch forms at once
_FIGURES = ("accuracy", "nll", "ece")


@dataclass(frozen=True)
class Fitted:
    """A trained model, and what it took.

    Attributes:
        predict: its predictions.
        choose_seconds: choosing hyperparameters on the training shots.
        fit: trains it once more, with what was chosen; for time and memory.
        choice: what was chosen.
    """

    predict: Predict
    choose_seconds: float
    fit: Callable[[], Any]
    choice: Any = None


def zero_shot(task: FitTask, options: PosteriorOptions) -> Fitted:
    """CLIP as it is."""
    head = build_head(task)
    return Fitted(lambda x: _softmax(head, x), 0.0, lambda: None)


def own(task: FitTask, options: PosteriorOptions) -> Fitted:
    """A method of this package."""
    start = time.perf_counter()
    found = calibrate(task, options) if task.options.method == "kalman" else Calibration(0.0, 1.0)
    chosen = time.perf_counter() - start
    predictor, choice = predictor_of(fit(task), options), {"tau": found.tau, "sharpening": found.sharpening}
    return Fitted(lambda x: found.predict(predictor, x).probabilities, chosen, lambda: fit(task), choice)


def laplace(structure: str) -> Callable[[FitTask, PosteriorOptions], Fitted]:
    """Laplace around AdamW's solution."""

    def fitted(task: FitTask, options: PosteriorOptions) -> Fitted:
        shots = DataLoader(TensorDataset(task.support.features, task.support.labels), task.options.batch_size)

        def train() -> Any:
            (delta,) = fit(task).head.parameters()
            model = Probe(task.class_embeddings, task.logit_scale, delta)
            found = Laplace(model, "classification", subset_of_weights="all", hessian_structure=structure)
            found.fit(shots)
            found.optimize_prior_precision(
                pred_type="glm", method="marglik", prior_structure="scalar", link_approx="probit"
            )
            return found

        found = train()
        return Fitted(lambda x: torch.cat([found(part, link_approx="probit") for part in x.split(_CHUNK)]), 0.0, train)

    return fitted


def ivon(task: FitTask, options: PosteriorOptions) -> Fitted:
    """IVON from the start."""
    start = time.perf_counter()
    fold = fold_of(task.support.labels, options.folds)

    def held_out_nll(settings: _Settings) -> float:
        total = 0.0
        for f in range(options.folds):
            rest, held = (task.support.subset(keep) for keep in (fold != f, fold == f))
            predict = _ivon(replace(task, support=rest), settings, options.draws)
            total += float(nll_loss(predict(held.features).clamp_min(1e-12).log(), held.labels, reduction="sum"))
        return total if total == total else float("inf")

    best = min(_IVON_GRID, key=held_out_nll)
    chosen = time.perf_counter() - start
    choice = dict(zip(("lr", "samples_per_shot", "hess_init"), best, strict=True))
    return Fitted(_ivon(task, best, options.draws), chosen, lambda: _ivon(task, best, options.draws), choice)


def _ivon(task: FitTask, settings: _Settings, draws: int) -> Predict:
    torch.manual_seed(task.seed)
    model = Probe(task.class_embeddings, task.logit_scale)
    lr, samples, hess_init = settings
    optimizer = IVON(model.parameters(), lr=lr, ess=samples * len(task.support), hess_init=hess_init)
    sampler = BatchSampler(task.support, task.options.batch_size, task.options.epochs, task.seed)
    for step in range(sampler.steps):
        batch = sampler.batch(step)
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            cross_entropy(model(batch.inputs), batch.labels).backward()
        optimizer.step()

    def predict(features: Tensor) -> Tensor:
        drawn = []
        for _ in range(draws):
            with optimizer.sampled_params():
                drawn.append(_softmax(model, features))
        return torch.stack(drawn).mean(0)

    return predict


def _softmax(model: nn.Module, features: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(features)
    return logits.softmax(1)


# name: preset, overrides of it, and how it is fitted
METHODS: dict[str, tuple[str, list[str], Callable[[FitTask, PosteriorOptions], Fitted]]] = {
    "zero-shot": ("adamw", [], zero_shot),
    "adamw": ("adamw", [], own),
    "laplace diag": ("adamw", [], laplace("diag")),
    "laplace kron": ("adamw", [], laplace("kron")),
    "ivon": ("adamw", [], ivon),
    "kalman": ("kalman", [], own),
    "kalman diagonal": ("kalman_diagonal", [], own),
}


def main() -> None:
    """Fit, score, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded", help="parquet file of the package's schema")
    parser.add_argument("--domain", default=None, help="domain trained on; the others are out of distribution")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="two or more")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument(
        "--markdown", action="store_true", help="measure nothing, put the tables of results/peers_*.json into README.md"
    )
    options = parser.parse_args()
    if options.markdown:
        kept = sorted(_RESULTS.glob("peers_*.json"))
        fill("peers", "\n\n".join(markdown(json.loads(path.read_text())) for path in kept))
        return
    name = "emoji" if options.data == "embedded" else Path(options.data).stem
    data = [f"seeds={options.seeds}", f"data.path={options.data}", f"data.shots={options.shots}"]
    data += [f"data.train_domain={options.domain or 'null'}", "data.draw=first"]  # as in the results that are kept
    found = {
        "environment": environment(),  # before the methods run
        "task": {"data": name, "domain": options.domain, "shots": options.shots, "seeds": options.seeds},
        "methods": {method: _measured(method, data) for method in METHODS},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"peers_{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))


def _measured(method: str, data: Sequence[str]) -> dict[str, Any]:
    preset, overrides, fitted = METHODS[method]
    kind = "adamw" if preset == "adamw" else "kalman"
    # the features as they are, for all methods
    config = load_config(overrides=[f"method={kind}", f"preset={preset}", "tune.views=0", *overrides, *data])
    prepared = prepare(open_task(config))
    made = {seed: fitted(_task(prepared, seed), config.posterior) for seed in config.seeds}
    return over_seeds([_figures(prepared, seed, made[seed]) for seed in config.seeds]) | {
        "peak_bytes": allocated(made[config.seeds[0]].fit)[1],
        "choices": {seed: model.choice for seed, model in made.items()},
    }


def _task(prepared: TaskData, seed: int) -> FitTask:
    support, scale = prepared.support(seed), prepared.model.logit_scale
    return FitTask(prepared.config.fit_options, seed, support, prepared.class_embeddings, scale)


def _figures(prepared: TaskData, seed: int, made: Fitted) -> dict[str, Any]:
    scores = {n: Scores.of(made.predict(t.features).detach(), t.labels) for n, t in prepared.tests(seed).items()}
    start = time.perf_counter()
    made.fit()
    seconds = {"fit_seconds": time.perf_counter() - start, "choose_seconds": made.choose_seconds}
    domains = [score for name, score in scores.items() if name != ID]
    ood = {"ood": Scores.mean(domains).as_dict()} if domains else {}
    return {"id": scores[ID].as_dict(), **ood, **seconds}


def markdown(found: dict[str, Any]) -> str:
    """Mean ± half of the 95 % interval over seeds."""
    task, e = found["task"], found["environment"]
    title = f"**{task['data']}**, {task['domain'] or 'default domain'}, {task['shots']} shots, seeds {task['seeds']}"
    head = ["", *(f"{s} {f}" for s in ("ID", "OOD") for f in ("accuracy %", "NLL", "ECE"))]
    head += ["fit s", "choose s", "peak MB"]
    lines = [f"{title}; {e['cpu']}, {e['date']}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, figures in found["methods"].items():
        cells = [_cell(figures.get(s, {}).get(f), f) for s in ("id", "ood") for f in _FIGURES]
        seconds = [f"{figures[key]['mean']:.2f}" for key in ("fit_seconds", "choose_seconds")]
        lines.append(f"| {name} | {' | '.join([*cells, *seconds])} | {figures['peak_bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


def _cell(figure: dict[str, float] | None, what: str) -> str:
    if figure is None:
        return ""
    factor, digits = (100, 1) if what == "accuracy" else (1, 3)
    return with_interval(figure, factor, digits).replace("±", " ± ")


if __name__ == "__main__":
    main()
