"""Compute what is missing, problem by problem."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import pandas as pd

from benchmarks.few_shot.data import Data
from benchmarks.few_shot.figures import row
from benchmarks.few_shot.methods import METHODS, Method
from benchmarks.few_shot.problem import Problem, Settings
from benchmarks.few_shot.search import FOLDS, search
from benchmarks.few_shot.store import Store, recipe_of

_LEAST_SEARCHED = 2  # shots of which some can be held out


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        shots: per class.
        seeds: number of support sets.
        methods: names.
        trials: of each search.
        domains: trained on; None are a data set's own.
        again: methods whose rows are computed even if they are there.
    """

    shots: Sequence[int]
    seeds: int
    methods: Sequence[str]
    trials: int
    domains: Sequence[str] | None = None
    again: Sequence[str] = ()


Say = Callable[[str], None]


@dataclass
class Runner:
    """Runs a plan on one data set.

    Attributes:
        data: the data set.
        plan: what is asked for.
        store: where results are.
        say: told what happens.
        methods: those that the plan names.
    """

    data: Data
    plan: Plan
    store: Store
    say: Say
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    _problems: dict[tuple[str, int], Problem] = field(default_factory=dict)

    def run(self) -> Iterator[pd.DataFrame]:
        """Compute what is missing.

        Yields:
            The rows of each (domain, shots, method), all seeds.
        """
        domains = self.data.domains
        if self.plan.domains is not None:
            known = self.data.most_shots
            domains = tuple(domain for domain in self.plan.domains if domain in known)
            if not domains:
                self.say(f"{self.data.name}: skipped, it has none of the domains {', '.join(self.plan.domains)}")
        for domain in domains:
            for shots in self.plan.shots:
                most = self.data.most_shots[domain]
                if shots > most:
                    self.say(f"{self.data.name} {domain} {shots} shots: skipped, a class has only {most} to train on")
                    continue
                for name in self.plan.methods:
                    yield self._rows(domain, shots, self.methods[name])
            self._problems.clear()

    def _rows(self, domain: str, shots: int, method: Method) -> pd.DataFrame:
        recipe, settings = self._settings(shots, method)
        data, seeds = self.data.name, list(range(self.plan.seeds))
        done = self.store.finished(data, domain, shots, method.name, recipe)
        missing = [seed for seed in seeds if seed not in done or method.name in self.plan.again]
        if missing:
            start = perf_counter()
            problem = self._problem(domain, shots)
            problem = Problem(
                [case for case in problem.cases if case.seed in missing], problem.class_embeddings, problem.logit_scale
            )
            found = method.fit(problem, settings)
            rows = [
                {
                    **dict(zip(("data", "domain", "shots", "seed", "method"), key, strict=True)),
                    "recipe": recipe,
                    **row(case, outcome),
                }
                for case, outcome in zip(problem.cases, found, strict=True)
                for key in [(data, domain, shots, case.seed, method.name)]
            ]
            self.store.add(data, method.name, rows)
            self.say(
                f"{data} {domain} {shots} shots {method.name}: {len(missing)} fits in {perf_counter() - start:.1f} s"
            )
        rows_now = self.store.rows(data, method.name)
        mine = (rows_now["domain"] == domain) & (rows_now["shots"] == shots) & rows_now["seed"].isin(seeds)
        return rows_now[mine]

    def _problem(self, domain: str, shots: int) -> Problem:
        key = (domain, shots)
        if key not in self._problems:
            self._problems = {key: self.data.problem(domain, shots, range(self.plan.seeds))}
        return self._problems[key]

    def _searched_on(self, shots: int) -> Problem:
        """A support set of each domain that is trained on: what suits one alone may fail on another."""
        able = [domain for domain in self.data.domains if shots <= self.data.most_shots[domain]]
        problems = [self.data.problem(domain, shots, [0]) for domain in able]
        return replace(problems[0], cases=[case for problem in problems for case in problem.cases])

    def _settings(self, shots: int, method: Method) -> tuple[str, Settings]:
        """What a method is fitted with, and the name of what decides its figures."""
        own = self.data.identity
        owner = self.methods[method.searched_as] if method.searched_as is not None else method
        if owner.space is None:
            return recipe_of(method.recipe, self.data.dev, *own), {}
        of = max(shots, _LEAST_SEARCHED)
        others = self.data.domains[1:]
        recipe = recipe_of(owner.name, owner.recipe, self.plan.trials, FOLDS, dict(owner.usual), *others, *own)
        found = self.store.search(self.data.name, of, owner.name, recipe)
        if found is None:
            found = search(owner, self._searched_on(of), self.plan.trials)
            self.store.keep_search(self.data.name, of, owner.name, recipe, found)
            self.say(f"{self.data.name} {of} shots {owner.name}: searched in {found['seconds']} s: {_short(found)}")
        return recipe_of(method.recipe, recipe, found["settings"], self.data.dev, *own), found["settings"]


def _short(found: dict[str, Any]) -> str:
    shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in found["settings"].items()}
    return ", ".join(f"{k}={v}" for k, v in shown.items()) + f", held-out NLL {found['nll']:.3f}"
