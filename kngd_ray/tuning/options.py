"""Options of a search: objective, number of trials, sampler. Plain data, validated when it is read."""

from dataclasses import dataclass
from typing import Literal

from kngd_ray.errors import UsageError

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
    """Options of a search. Neither the search nor any trial sees the test split.

    Attributes:
        objective: one or more objectives, each a mean over the support sets of `seeds`. Several search for their Pareto
            front; its best point by the first objective wins. ``evidence`` is the log-probability per shot that the
            filter assigns to labels before it learns them, in one pass over the shots. ``held_out_nll`` and
            ``held_out_accuracy`` are measured on shots held out in ``posterior.folds`` folds. ``log_posterior`` is the
            log-density of the settings given held-out shots, per shot. It combines the held-out labels with the priors
            of the space, which matter more if there are few shots.
        num_samples: number of trials.
        batch: trials suggested at once. A suggestion uses the results of earlier batches only, so a search depends only
            on its seed, not on the number of processes or on interruptions.
        seeds: support sets of each trial.
        sampler: Optuna's sampler; ``nsga2`` takes `batch` as its population.
        seed: of the sampler.
        start: presets or YAML files to try first, as far as the space contains them; None is the configuration's.
        scheduler: ``asha`` stops a trial that is worse than others after its first support sets.
        trial: ``local`` runs a trial in one process, ``batched`` several of one shape at once in one, ``train``
            each as a Ray Train job of ``trainer.num_workers`` ranks. ``auto`` takes ``train`` where a covariance is
            above 1 GiB; ``local`` above 16 MiB, with a scheduler or with trained towers; ``batched`` otherwise.
        concurrency: processes that run trials at the same time; None is as many as the CPUs allow.
        cpus_per_trial: CPU cores that each of them reserves.
        max_failures: number of failed trials after which the search stops.
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

    def check_single_shots(self) -> None:
        """Refuse objectives that say nothing where no class has two shots.

        Raises:
            UsageError: there is one.
        """
        for name in self.objective:
            if name in {"held_out_nll", "held_out_accuracy"}:
                raise UsageError(
                    f"search.objective is {name}, and no class has two shots: a fold would be of classes that nothing "
                    "was learned of, and the less a trial learns, the better it would look. Give data.shots=2 or more, "
                    "or take search.objective=log_posterior, by which the priors of the space decide."
                )

    @property
    def cross_validated(self) -> bool:
        """Whether an objective needs held-out shots."""
        return any(name != "evidence" for name in self.objective)
