"""From a parquet file of the package's schema to problems."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.few_shot.problem import Case, Problem
from kngd_ray.clip import ClipModel, load_model
from kngd_ray.commands.prepare import Task, prepare
from kngd_ray.config import Config, load_config, override
from kngd_ray.data import EMBEDDED, Split, open_images, select

_EMBEDDED_DOMAINS = ("noto",)


class DataSet:
    """A data set whose features are computed once, by the package's cache.

    Args:
        path: parquet file, or ``embedded``.
        dev: whether training pictures stand for the test sets.
    """

    def __init__(self, path: str, *, dev: bool = False) -> None:
        self.path = path
        self.name = "emoji" if path == EMBEDDED else Path(path).stem
        self.dev = dev
        self._config = load_config(overrides=["method=adamw", f"data.path={path}"])
        self.images = open_images(self._config.data)

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Domains that are trained on in turn; the first is the one that settings are searched on."""
        if self.path == EMBEDDED:
            return _EMBEDDED_DOMAINS
        return tuple(sorted(set(self.images.domains[self.images.splits == "train"].tolist())))

    @cached_property
    def most_shots(self) -> dict[str, int]:
        """By domain the training pictures of the class that has fewest."""
        train = self.images.splits == "train"
        classes = len(self.images.class_names)
        return {
            domain: int(
                np.bincount(self.images.labels[train & (self.images.domains == domain)], minlength=classes).min()
            )
            for domain in sorted(set(self.images.domains.tolist()))
        }

    @cached_property
    def _model(self) -> ClipModel:
        return load_model(self._config.model)

    def problem(self, domain: str, shots: int, seeds: Sequence[int]) -> Problem:
        """Support sets of a domain.

        Args:
            domain: trained on.
            shots: per class.
            seeds: of the support sets.

        Returns:
            The problem.
        """
        settings = {"data.train_domain": domain, "data.shots": shots, "seeds": list(seeds)}
        config = override(self._config, settings)

        def choose(bad: frozenset[int]) -> dict[int, Split]:
            return {seed: self._split(config, seed, bad) for seed in seeds}

        images = self.images
        prepared = prepare(Task(config, images, images, choose, choose(frozenset()), self._model, False))
        cases = [Case(prepared.support(seed), prepared.tests(seed), seed) for seed in seeds]
        return Problem(cases, prepared.class_embeddings, prepared.model.logit_scale)

    def _split(self, config: Config, seed: int, bad: frozenset[int]) -> Split:
        images = self.images
        split = select(images, config.data, seed, bad)
        if not self.dev:
            return split
        train = (images.splits == "train") & ~np.isin(images.keys, images.keys[split.support])
        train[list(bad)] = False
        own = images.domains == config.data.train_domain
        ood = {domain: np.flatnonzero(train & (images.domains == domain)) for domain in split.ood}
        return replace(
            split, id_test=np.flatnonzero(train & own), ood={d: rows for d, rows in ood.items() if len(rows)}
        )
