"""How trials run: several at once in one process, one per process, or each as a job of several ranks."""

from itertools import product
from typing import Literal

from kngd_ray.clip import CLIPHead
from kngd_ray.config import Config, override
from kngd_ray.errors import UsageError
from kngd_ray.observations import Linearizer
from kngd_ray.tuning.objective import Workload
from kngd_ray.tuning.space import Choice, Space

Mode = Literal["local", "batched", "train"]

_ONE_PROCESS = 1 << 27  # numbers of a covariance up to which a fit runs in one process
_SEVERAL = 1 << 21  # and several of them, with what a step makes of them
_SHAPES = ("adapter", "filter.covariance")  # settings that decide how large it is


def mode_of(work: Workload, space: Space) -> Mode:
    """How the trials of a search are run where ``search.trial`` leaves it open.

    Args:
        work: what trials work on.
        space: what is searched.

    Returns:
        What was asked for; of ``auto`` what the largest covariance in the space and the scheduler allow.
    """
    if work.search.trial != "auto":
        return work.search.trial
    if work.towers is not None:
        return "local"  # towers of one trial keep a process busy; search.trial=train gives each ranks and GPUs
    largest = max(_numbers(config, work) for config in _shapes(work.config, space))
    if largest > _ONE_PROCESS:
        return "train"
    return "batched" if work.search.scheduler == "none" and largest <= _SEVERAL else "local"


def _shapes(config: Config, space: Space) -> list[Config]:
    """The configuration for each adapter and covariance family in the space."""
    domains = {d.key: d.domain.choices for d in space.dimensions if d.key in _SHAPES and isinstance(d.domain, Choice)}
    found = []
    for values in product(*domains.values()):
        try:
            found.append(override(config, dict(zip(domains, values, strict=True))))
        except UsageError:  # such a trial fails by itself
            continue
    return found or [config]


def _numbers(config: Config, work: Workload) -> int:
    if config.method != "kalman":
        return 0
    head = CLIPHead(work.class_embeddings, work.logit_scale, config.adapter)
    layers = Linearizer(head, work.class_embeddings[:2]).layers
    family = config.filter.covariance
    if family.joint:  # its cost by layer is a proportion
        return sum(layer.size for layer in layers) ** 2
    return sum(family.cost(layer) for layer in layers)
