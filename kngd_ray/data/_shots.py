"""Few-shot tasks: which pictures are learnt from and which are tested on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kngd_ray.data._config import DataConfig
from kngd_ray.data._images import ImageSet
from kngd_ray.data._source import Ints, Keys, hint, listing
from kngd_ray.data._stream import in_order, in_time
from kngd_ray.errors import DataError, spelled


@dataclass(frozen=True, eq=False)
class Split:
    """Indices into an `ImageSet`; no picture of the support set, nor a copy of one, is in a test part.

    Attributes:
        support (C * shots,): pictures to learn from, class by class, those of a stream as they come; none for a fit
            that is only tested.
        id_test (T,): in-distribution test pictures, ascending.
        ood: per domain, its test pictures (T_d,), ascending.
    """

    support: Ints
    id_test: Ints
    ood: dict[str, Ints]

    @property
    def indices(self) -> Ints:
        """Every index of the task once, ascending: what needs a feature."""
        return np.unique(np.concatenate([self.support, self.id_test, *self.ood.values()]))


def sample_shots(
    labels: Ints,
    candidates: Ints,
    shots: int,
    seed: int,
    class_names: Sequence[str] | None = None,
    *,
    domains: npt.NDArray[np.str_] | None = None,
    keys: Keys | None = None,
    draw: Literal["random", "first"] = "random",
) -> Ints:
    """Draw a support set.

    A seed takes the head of its own permutation of each class, so fewer shots of a seed are always part of more. Of
    several domains each gives a picture before one gives another. No picture is drawn twice, nor a copy of it.

    Args:
        labels (N,): class numbers.
        candidates (M,): indices to draw from.
        shots: pictures per class.
        seed: 0 or more.
        class_names: names of the C classes; None takes the numbers up to the largest label.
        domains (N,): domain names; None for one domain.
        keys (N,): picture hashes, the same for copies; None where there are none.
        draw: "first" permutes without regard to domains, and takes seed 0 in file order.

    Returns:
        Indices (C * shots,), class by class in the order drawn.

    Raises:
        DataError: when a class has too few candidates.
    """
    names = [str(n) for n in range(int(labels.max()) + 1)] if class_names is None else class_names
    rows = np.sort(candidates)
    drawn = []
    for label, name in enumerate(names):
        order = rows[labels[rows] == label]
        if draw == "random" or seed > 0:
            order = np.random.default_rng([seed, label]).permutation(order)
        found = len(order)
        if keys is not None:
            order = order[np.sort(np.unique(keys[order], return_index=True)[1])]
        if domains is not None and draw == "random":
            order = order[np.argsort(_turns(domains[order]), kind="stable")]
        if len(order) < shots:
            less = f" ({found} with copies)" if found > len(order) else ""
            raise DataError(
                f"class {spelled(name)} has {len(order)} pictures to train on{less}, fewer than {shots} shots:"
                " lower data.shots, add pictures, or leave the class out with data.classes"
            )
        drawn.append(order[:shots])
    return np.concatenate(drawn)


def _turns(domains: npt.NDArray[np.str_]) -> Ints:
    """Return for each picture (M,) how many of its domain are before it."""
    turns = np.empty(len(domains), np.int64)
    for domain in np.unique(domains):
        here = np.flatnonzero(domains == domain)
        turns[here] = np.arange(len(here))
    return turns


def select(images: ImageSet, config: DataConfig, seed: int, excluded: Collection[int] = frozenset()) -> Split:
    """Choose the support set and the test parts of a run.

    Args:
        images: the data set.
        config: domains and shots.
        seed: draws the support set.
        excluded: indices of pictures that cannot be used.

    Returns:
        The support set from train rows of the trained domains, test rows of these, and test rows of
        each domain tested out of distribution. A DataError tells of an unknown domain, one without
        test pictures, and a class with too few shots.
    """
    trained, _ = _domains(images, config)
    train = _usable(images, "train", excluded) & np.isin(images.domains, trained)
    if config.order is not None:
        support = in_order(images, train, config.order, config.shots, seed)
    elif config.time is not None:
        support = in_time(images, train, config.time)
    else:
        support = sample_shots(
            images.labels,
            np.flatnonzero(train),
            config.shots,
            seed,
            images.class_names,
            domains=images.domains,
            keys=images.keys,
            draw=config.draw,
        )
    return _with_tests(images, config, excluded, support)


def select_tests(images: ImageSet, config: DataConfig, excluded: Collection[int] = frozenset()) -> Split:
    """Choose the test parts of data that nothing is learnt from.

    Args:
        images: the data set; it needs no train rows.
        config: domains.
        excluded: indices of pictures that cannot be used.

    Returns:
        The parts that :func:`select` chooses, with an empty support set. A DataError tells of an
        unknown domain, and of one without test pictures.
    """
    return _with_tests(images, config, excluded, np.empty(0, np.int64))


def _usable(images: ImageSet, split: str, excluded: Collection[int]) -> npt.NDArray[np.bool_]:
    """Return which pictures (N,) are of a split and not excluded."""
    usable = images.splits == split
    usable[list(excluded)] = False
    return usable


def _with_tests(images: ImageSet, config: DataConfig, excluded: Collection[int], support: Ints) -> Split:
    """Add to a support set the test parts without copies of its pictures.

    Raises:
        DataError: when a domain has no test pictures.
    """
    trained, ood = _domains(images, config)
    test = _usable(images, "test", excluded) & ~np.isin(images.keys, images.keys[support])
    id_test = np.flatnonzero(test & np.isin(images.domains, trained))
    parts = {domain: np.flatnonzero(test & (images.domains == domain)) for domain in ood}
    for names, part in [(trained, id_test), *(([domain], part) for domain, part in parts.items())]:
        if not len(part):
            raise DataError(
                f"domain {listing(names)} has no usable test pictures: add test rows; or, if the data states no split"
                " or that is left out, raise data.test_fraction to have some held out"
            )
    return Split(support, id_test, parts)


def _domains(images: ImageSet, config: DataConfig) -> tuple[list[str], list[str]]:
    """Return the domains trained on and those tested out of distribution.

    Raises:
        DataError: when a domain is unknown or both, or none is left to train on.
    """
    known: list[str] = sorted(set(images.domains.tolist()))
    named = config.trained_domain
    ordered = list(dict.fromkeys(config.order or ()))
    for field, domains in (
        ("order", ordered),
        ("train_domain", [named] if named else []),
        ("ood_domains", config.ood_domains or []),
    ):
        for domain in domains:
            if domain not in known:
                raise DataError(
                    f"data.{field}: there is no domain {domain!r}{hint(domain, known)}:"
                    f" the data set has {listing(known)}"
                )
    trained = [named] if named else [domain for domain in known if domain not in (config.ood_domains or ())]
    trained = ordered or trained
    if not trained or set(trained) & set(config.ood_domains or ()):
        raise DataError("data.ood_domains leaves no domain to train on: leave one of them out")
    if config.ood_domains is not None:
        return trained, list(config.ood_domains)
    tested = set(images.domains[images.splits == "test"].tolist())
    return trained, [domain for domain in known if domain in tested and domain not in trained]
