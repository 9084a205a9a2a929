"""``protocol=stream``: how a stream is fitted, and the figures of how it went."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from kngd_ray.clip import CLIPHead
from kngd_ray.console import Display, stacked
from kngd_ray.experiment.prepared import TaskData
from kngd_ray.training.metrics import Scores
from kngd_ray.training.options import FitOptions
from kngd_ray.training.stream import Look, Met, Stream, prequential, retention, stages_of

METRICS = "stream/"
# of one batch: under the names of the whole stream's figures, MLflow's latest value of those would be the last batch's
BATCH = f"{METRICS}batch/"
_FIGURES = ("accuracy", "nll", "tau")


def stream_of(prepared: TaskData, seed: int) -> Stream | None:
    """The stream that the fits of a seed learn from.

    Args:
        prepared: the run's data.
        seed: of the stream.

    Returns:
        The stream, with the tests of each of its domains; None where the protocol is another.
    """
    config, split = prepared.config, prepared.splits[seed]
    if config.protocol != "stream":
        return None
    stages = stages_of(config.data.order or (), len(split.support))
    tested = prepared.images.domains[split.id_test]
    tests = {str(domain): prepared.features(split.id_test[tested == domain]) for domain in np.unique(tested)}
    return Stream(config.posterior, stages, tests)


def step_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of a step of a stream.

    Args:
        record: fields of a ``StepRecord``.

    Returns:
        Metrics by name; none of a step that neither meets a batch nor ends a stage.
    """
    met, look = record["met"], record["look"]
    found = {} if met is None else {f"{BATCH}{name}": met[name] for name in (*_FIGURES, "size")}
    if look is not None:
        found |= {f"{METRICS}tested/{domain}": share for domain, share in look["accuracy"].items()}
        found[f"{METRICS}samples"] = look["samples"]
    return found


class Streamed:
    """How a fit of a stream went, from its log.

    Args:
        stream: the stream.
        steps: of the record, those before a resume too.
    """

    def __init__(self, stream: Stream, steps: Sequence[Mapping[str, float]]) -> None:
        self.stages = stream.stages
        self.met, self.looks = [], []
        for step in steps:
            of_batch = BATCH if f"{BATCH}size" in step else METRICS  # as runs were logged that an earlier version began
            if f"{of_batch}size" in step:
                accuracy, nll, tau = (step[f"{of_batch}{name}"] for name in _FIGURES)
                self.met.append(Met(int(step[f"{of_batch}size"]), accuracy, nll, tau))
            if f"{METRICS}samples" in step:
                tested = {domain: step[f"{METRICS}tested/{domain}"] for domain in stream.tests}
                self.looks.append(Look(int(step[f"{METRICS}samples"]), tested))

    def figures(self) -> dict[str, float]:
        """Prequential accuracy and NLL, and the accuracy kept on earlier domains."""
        return {**prequential(self.met), **retention(self.stages, self.looks)}

    def curve(self) -> dict[str, Any]:
        """The figures over time, as plain data: of each batch, and of the tests when they were looked at."""
        return {
            "samples": np.cumsum([met.size for met in self.met]).tolist(),
            "accuracy": [met.accuracy for met in self.met],
            "nll": [met.nll for met in self.met],
            "tau": [met.tau for met in self.met],
            "stages": [{"domain": stage.domain, "end": stage.end} for stage in self.stages],
            "tested": [{"samples": look.samples, "accuracy": dict(look.accuracy)} for look in self.looks],
        }


def zero_shot_figures(prepared: TaskData, seed: int) -> dict[str, Any]:
    """Prequential figures of zero-shot CLIP, which learns nothing.

    Args:
        prepared: the run's data.
        seed: of the stream.

    Returns:
        ``stream`` and its figures; nothing where the protocol is another.
    """
    if prepared.config.protocol != "stream":
        return {}
    head, shots = CLIPHead(prepared.class_embeddings, prepared.model.logit_scale), prepared.support(seed)
    with torch.no_grad():
        scores = Scores.of(head(shots.features).softmax(1), shots.labels)
    return {"stream": {"accuracy": scores.accuracy, "nll": scores.nll}}


def show_streams(
    rows: Sequence[tuple[str, Mapping[str, Any]]], options: FitOptions, stream: Stream, display: Display
) -> None:
    """Print the prequential figures, and the accuracy kept on earlier domains.

    Args:
        rows: method and its report over seeds.
        options: of the run's method.
        stream: of one of its seeds.
        display: where.
    """
    order = " > ".join(stage.domain for stage in stream.stages) or "in the order of time"
    title = f"the stream, {order}: batches of {options.batch_size}, each predicted before it is learned from"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    shown = {"accuracy": "prequential\naccuracy %", "nll": "\nNLL"}
    kept = {"learned": "tests when\nlearned %", "final": "at the\nend %", "forgetting": "\nforgotten %"}
    present = {name: heading for name, heading in kept.items() if any(name in report["stream"] for _, report in rows)}
    for heading in (shown | present).values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, report in rows:
        found = report["stream"]
        cells = [stacked(found["accuracy"], 100), stacked(found["nll"])]
        cells += [stacked(found[name], 100) if name in found else "" for name in present]
        table.add_row(escape(name), *cells)
    display.out.print(table)
