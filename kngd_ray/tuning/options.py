"""Options of a search: what is optimised, how many trials, by whom. Plain data, validated when it is read."""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["log_posterior", "evidence", "held_out_nll", "held_out_accuracy"]

# Whether more is better.
DIRECTIONS: dict[Objective, Literal["maximize", "minimize"]] = {
    "log_posterior": "maximize",
    "evidence": "maximize",
    "held_out_nll": "minimize",
    "held_out_accuracy": "maximize",
}


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a search goes about it. None of it, nor any trial, sees the test split.

    Attributes:
        objective: what a trial is judged by, each a mean over the support sets of `seeds`; several make a search for
            their Pareto front, whose best by the first is the winner. ``evidence`` is the log-probability per shot
            that the filter gives to labels before it learns from them, in one pass over the shots; ``held_out_nll`` and
            ``held_out_accuracy`` are of shots held out from the fit, in ``posterior.folds`` folds. ``log_posterior`` is
            the log-density of the settings given such shots, per shot: what they say of the held-out labels, and the
            priors of the space's dimensions, which a handful of shots moves less than many do.
        num_samples: trials.
        batch: trials suggested at once. A suggestion knows the results of all earlier batches and none of its own, so
            that a search is a function of its seed, however many processes run it and whenever they are killed.
        seeds: support sets that each trial is judged on.
        sampler: Optuna's sampler; ``nsga2`` takes `batch` as its population.
        seed: of the sampler.
        start: presets, or YAML files, tried first, as far as the space reaches; None is that of the configuration.
        scheduler: ``asha`` stops a trial that is behind after its first support sets.
        trial: ``local`` runs a trial in one process, ``batched`` several of one shape at once in one, ``train``
            each as a Ray Train job of ``trainer.num_workers`` ranks. ``auto`` takes ``train`` where a covariance is
            too large for one process, ``local`` with a scheduler, ``batched`` otherwise.
        concurrency: processes that run trials at once; None is as many as the CPUs allow.
        cpus_per_trial: CPU cores that each of them reserves.
        max_failures: failed trials after which the search gives up.
        refit: fit and test the winner at the end, on the support sets of the configuration's ``seeds``.
    """

    objective: tuple[Objective, ...] = ("evidence",)
    num_samples: int = 60
    batch: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    sampler: Literal["tpe", "gp", "nsga2", "random"] = "tpe"
    seed: int = 0
    start: tuple[str, ...] | None = None
    scheduler: Literal["none", "asha"] = "none"
    trial: Literal["auto", "local", "batched", "train"] = "auto"
    concurrency: int | None = None
    cpus_per_trial: float = 1.0
    max_failures: int = 20
    refit: bool = True

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("batch", 1), ("seed", 0), ("max_failures", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if self.sampler == "nsga2" and self.batch < 2:
            raise ValueError("batch is 1; nsga2 takes it as its population, which needs 2 or more")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(
                f"concurrency is {self.concurrency}; give 1 or more, or null for as many as there are CPUs"
            )
        if not self.cpus_per_trial > 0:
            raise ValueError(f"cpus_per_trial is {self.cpus_per_trial}; a process needs more than 0")
        if not self.objective or len(set(self.objective)) < len(self.objective):
            raise ValueError(
                f"objective is {list(self.objective)}; name one or more ({', '.join(DIRECTIONS)}), each once"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds is {list(self.seeds)}; name at least one; seeds must differ and be 0 or more")
        if self.scheduler == "asha" and len(self.objective) > 1:
            raise ValueError("scheduler is asha, which compares trials by one objective, and there are several")
        if self.scheduler == "asha" and self.trial == "batched":
            raise ValueError("scheduler is asha, which stops trials one by one: take trial=local or train with it")

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        """Optuna's direction of each objective."""
        return [DIRECTIONS[name] for name in self.objective]

    @property
    def cross_validated(self) -> bool:
        """Whether an objective needs held-out shots."""
        return any(name != "evidence" for name in self.objective)
