"""What a run is tested on besides its own classes: the other half of its classes, or other data sets."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from kngd_ray.clip import worded
from kngd_ray.config import Config
from kngd_ray.console import Display, stacked
from kngd_ray.data import EMBEDDED, ImageSet, halves, open_images, restrict, select_tests
from kngd_ray.errors import DataError, UsageError
from kngd_ray.experiment.backend import Backend
from kngd_ray.experiment.features import Progress, encode_pictures
from kngd_ray.experiment.learned import among, begun
from kngd_ray.experiment.prepared import TaskData
from kngd_ray.experiment.task import Task
from kngd_ray.training.batches import Shots, Support
from kngd_ray.training.calibration import AnyPredictor, Calibration
from kngd_ray.training.evaluation import ID, MEAN, evaluate, set_name
from kngd_ray.training.network_predictor import NetworkPredictor
from kngd_ray.training.pixels import TestPictures
from kngd_ray.training.transfer import transferred

NEW = "new"


@dataclass(frozen=True)
class Unseen:
    """Pictures of classes that are not trained on.

    Attributes:
        images: the index of these classes.
        rows: (N,) which of its pictures are tested on.
        known: how many of its test pictures are not, since the run or its priors learn from them.
    """

    images: ImageSet
    rows: np.ndarray[Any, np.dtype[np.int64]]
    known: int = 0

    @property
    def note(self) -> str | None:
        """What is left out, in a sentence; None where nothing is."""
        if not self.known:
            return None
        pictures, them = ("picture", "it") if self.known == 1 else ("pictures", "them")
        return f"{self.known} test {pictures} left out: the run, or one that it continues, learns from {them}"


def open_protocol(config: Config, task: Task, earlier: frozenset[str] = frozenset()) -> dict[str, Unseen]:
    """Find the protocol's test data, before anything expensive happens.

    Args:
        config: what is asked for.
        task: the run's own data.
        earlier: beginnings of the hashes of pictures that its priors have learned from.

    Returns:
        Unseen classes by name: ``new`` of ``bng``, the data sets of ``cdg``, none of others.

    Raises:
        UsageError: ``dg`` without a domain out of distribution, or a target twice.
        DataError: a target that cannot be used, or new classes without test pictures.
    """
    shots = earlier.union(*(begun(task.images.keys[split.support]) for split in task.splits.values()))
    if config.protocol == "dg" and not any(split.ood for split in task.splits.values()):
        raise UsageError(
            "protocol=dg needs a test domain that is not trained on, and there is none: set data.train_domain to one "
            "of several, or data.ood_domains."
        )
    if config.protocol == "bng":
        new = restrict(task.whole, halves(task.whole.class_names)[1])
        # domains are those of the whole: a half may lack one that the other has
        tested = select_tests(task.whole, replace(config.data, ood_domains=_ood(task))).id_test
        in_test, known = np.isin(new.rows, task.whole.rows[tested]), among(new, shots)
        if not (in_test & ~known).any():
            raise DataError(
                "the new classes have no test pictures in the domains trained on: add some, or name others."
            )
        return {NEW: Unseen(new, np.flatnonzero(in_test & ~known), int((in_test & known).sum()))}
    return {
        set_name(name): _target(config, path, shots)
        for name, path in zip(_names(config.targets), config.targets, strict=True)
    }


def _ood(task: Task) -> tuple[str, ...]:
    """The domains out of distribution that a task has come to, the same for all seeds."""
    return tuple(next(iter(task.splits.values())).ood)


def _target(config: Config, path: str, shots: frozenset[str]) -> Unseen:
    """Index a data set with classes of its own.

    Raises:
        DataError: it cannot be read, or has too little to test on.
    """
    data = replace(config.data, path=path, train_domain=None, ood_domains=None, classes=None)
    try:
        images = open_images(data, test_fraction=1.0)
    except DataError as error:
        raise DataError(f"the target {path} cannot be tested on: {error}".replace("data.path", "targets")) from error
    in_test, known = images.splits == "test", among(images, shots)
    rows = np.flatnonzero(in_test & ~known)
    if len(images.class_names) < 2 or not len(rows):
        lacking = "test pictures" if not len(rows) else "a second class"
        raise DataError(f"the target {path} cannot be tested on: it lacks {lacking}.")
    return Unseen(images, rows, int((in_test & known).sum()))


def _names(paths: Sequence[str]) -> list[str]:
    """What data sets are called: the last parts of their paths, as many as tell them apart.

    Raises:
        UsageError: one is there twice.
    """
    parts = [("emoji",) if path == EMBEDDED else _without_suffix(Path(path).expanduser().absolute()) for path in paths]
    files = {path if path == EMBEDDED else os.path.realpath(Path(path).expanduser()) for path in paths}
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names) == len(files):
            return names
    if paths:
        raise UsageError(f"targets names a data set twice: {', '.join(paths)}; name each once.")
    return []


def _without_suffix(path: Path) -> tuple[str, ...]:
    """The parts of a path, the last one without the suffix of a parquet file."""
    name = path.name.removesuffix(".parquet")
    return (*path.parent.parts, name)


@dataclass(frozen=True)
class Protocol:
    """Test data of a run's fits besides their own classes.

    Attributes:
        name: of the protocol.
        prepared: the run's own data, its model, and where features are.
        unseen: other classes by name.
        class_embeddings: (C', d) of each by the pretrained text tower.
    """

    name: str
    prepared: TaskData
    unseen: dict[str, Unseen]
    class_embeddings: dict[str, torch.Tensor]

    def figures(
        self, predictor: AnyPredictor, calibration: Calibration, own: Mapping[str, Any], gamma: float = 1.0
    ) -> dict[str, Any]:
        """Score a fit, or the pretrained model, on the unseen classes.

        Args:
            predictor: over the run's own classes.
            calibration: tau and T for its predictions; new classes are not sharpened.
            own: the figures in distribution of the run's own classes.
            gamma: how much of the zero-shot logits is believed of classes that a class residual says nothing of.

        Returns:
            Figures under ``protocol``; nothing where the protocol tests on nothing else.
        """
        found = {name: self._score(name, predictor, calibration, gamma) for name in self.unseen}
        if self.name == "bng":
            base, new = own["accuracy"], found[NEW]["accuracy"]
            hm = 2 * base * new / (base + new) if base + new else 0.0
            return {"protocol": {"base": dict(own), "new": found[NEW], "hm": hm}}
        if self.name == "cdg":
            return {"protocol": {"targets": {MEAN: _average(list(found.values())), **found}}}
        return {}

    def _score(self, name: str, predictor: AnyPredictor, calibration: Calibration, gamma: float) -> dict[str, Any]:
        unseen = self.unseen[name]
        templates = worded(self.prepared.config.data.templates, unseen.images.class_names)
        other = transferred(predictor, unseen.images.class_names, templates, self.class_embeddings[name], gamma)
        tests: Shots = TestPictures(unseen.images, unseen.rows)
        if not isinstance(other, NetworkPredictor):
            features = torch.from_numpy(self.prepared.cache.read(unseen.images.keys[unseen.rows]))
            tests = Support(features, tests.labels)
        of_others = replace(calibration, sharpening=1.0)  # shots of the trained classes found those too uncertain
        figures: dict[str, Any] = evaluate(other, {ID: tests}, of_others).report()[ID]
        return figures

    def named(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """A report with its figures under the protocol's name; few-shot learning adds none."""
        if self.name == "fsl":
            return dict(report)
        return {**report, "protocol": {"name": self.name, **report.get("protocol", {})}}

    def show(self, rows: Sequence[tuple[str, Mapping[str, Any]]], display: Display) -> None:
        """Print the table of the protocol.

        Args:
            rows: method and its report over seeds.
            display: where.
        """
        if self.name == "bng":
            self._show_halves(rows, display)
        elif self.name == "cdg":
            sets = [name for name in rows[0][1]["protocol"]["targets"] if name != MEAN or len(self.unseen) > 1]
            by_set = {name: [(m, r["protocol"]["targets"][name]) for m, r in rows] for name in sets}
            _show_sets("data sets that nothing was learned from", "data set", by_set, display)
        elif self.name == "dg":
            domains = [name for name in rows[0][1]["ood"] if name != MEAN]
            by_set = {name: [(m, r["ood"][name]) for m, r in rows] for name in domains}
            _show_sets("domains that nothing was learned from", "domain", by_set, display)

    def _show_halves(self, rows: Sequence[tuple[str, Mapping[str, Any]]], display: Display) -> None:
        base, new = len(self.prepared.images.class_names), len(self.unseen[NEW].images.class_names)
        table = _table(f"base to new: {base} classes trained on, {new} others known by their texts alone")
        table.add_column("")
        for group in ("base", "new"):
            for figure in ("accuracy %", "NLL", "ECE"):
                table.add_column(f"{group}\n{figure}", justify="right", no_wrap=True)
        table.add_column("harmonic\nmean %", justify="right", no_wrap=True)
        for name, report in rows:
            found = report["protocol"]
            table.add_row(escape(name), *_cells(found["base"]), *_cells(found["new"]), stacked(found["hm"], 100))
        display.out.print(table)


def prepare_protocol(
    config: Config, unseen: Mapping[str, Unseen], prepared: TaskData, backend: Backend, progress: Progress | None
) -> Protocol:
    """Compute the features of unseen classes that are missing.

    Args:
        config: what is asked for.
        unseen: from :func:`open_protocol`.
        prepared: the run's own data.
        backend: encodes, its session begun.
        progress: called with the numbers of pictures done and to do.

    Returns:
        The protocol, pictures that cannot be decoded left out of it if that is asked for.

    Raises:
        DataError: none of a data set's pictures can be decoded.
    """
    model, cache = prepared.model, prepared.cache
    usable = {}
    for name, found in unseen.items():
        bad = encode_pictures(config, found.images, found.rows, model, cache, backend, progress)
        rows = found.rows[~np.isin(found.rows, list(bad))]
        if not len(rows):
            raise DataError(f"none of the test pictures of {name} can be decoded.")
        usable[name] = replace(found, rows=rows)
    embeddings = {
        name: model.encode_classes(names, worded(prepared.config.data.templates, names))
        for name, names in ((name, found.images.class_names) for name, found in usable.items())
    }
    return Protocol(config.protocol, prepared, usable, embeddings)


def _average(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested figures, each the mean of its own."""
    return {
        key: _average([f[key] for f in figures]) if isinstance(value, Mapping) else fmean(f[key] for f in figures)
        for key, value in figures[0].items()
    }


def _show_sets(
    title: str, kind: str, by_set: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]], display: Display
) -> None:
    table = _table(title)
    for heading in (kind, ""):
        table.add_column(heading)
    for figure in ("accuracy %", "NLL", "ECE"):
        table.add_column(figure, justify="right", no_wrap=True)
    for name, rows in by_set.items():
        for number, (method, figures) in enumerate(rows):
            table.add_row(escape(name) if number == 0 else "", escape(method), *_cells(figures))
    display.out.print(table)


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _cells(figures: Mapping[str, Any]) -> tuple[str, str, str]:
    return stacked(figures["accuracy"], 100), stacked(figures["nll"]), stacked(figures["ece"])
