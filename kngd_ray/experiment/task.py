"""From a configuration to a task: the data set, the model, the shots and the test sets, before any is encoded."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kngd_ray.clip import (
    LOGIT_SCALE,
    AnyModel,
    ClipModel,
    CLIPNetwork,
    load_model,
    resolve_templates,
    same_sentences,
    worded,
)
from kngd_ray.config import Config
from kngd_ray.data import (
    Crops,
    DataConfig,
    EncodedBy,
    FeatureFiles,
    ImageSet,
    Split,
    arrange,
    halves,
    open_images,
    restrict,
    select,
    select_tests,
)
from kngd_ray.errors import DataError, spelled
from kngd_ray.experiment.features import given_model, given_views, row_notes, stated_model
from kngd_ray.training.network_predictor import check_affordable
from kngd_ray.training.restoring import identity_of
from kngd_ray.training.views import crops_of, views_of

Choose = Callable[[frozenset[int]], dict[int, Split]]


@dataclass(frozen=True)
class Task:
    """A configuration whose data and model are known to serve it; nothing expensive has happened yet.

    Attributes:
        config: what is asked for.
        images: the data set's index, of the classes that are trained on.
        whole: the index of all its classes; a run from base to new classes trains on half of them.
        choose: gives the support set and the test sets by seed, without the pictures that it is given.
        splits: what it gives when all pictures can be used.
        model: the CLIP model, or what stands for it.
        from_pictures: whether fits learn from pictures; cached features stand for them while the image tower is frozen.
        known: whether a fit of it is there already.
    """

    config: Config
    images: ImageSet
    whole: ImageSet
    choose: Choose
    splits: dict[int, Split]
    model: AnyModel
    from_pictures: bool
    known: bool

    @property
    def notes(self) -> list[str]:
        """What is to be said of the data and its prompts before anything is done with them, in lines."""
        source, lines = self.whole.source, list(self.whole.notes)
        domains, counts = np.unique(self.images.domains[next(iter(self.splits.values())).support], return_counts=True)
        if len(domains) > 1:
            drawn = ", ".join(f"{count} of {domain}" for domain, count in zip(domains[:8], counts[:8], strict=True))
            more = f" and of {len(domains) - 8} more" if len(domains) > 8 else ""
            lines.append(f"shots are drawn over {len(domains)} domains, {drawn}{more}: data.train_domain chooses one")
        if one_support(self.splits, ordered=self.config.protocol == "stream"):
            what = "stream" if self.config.protocol == "stream" else "shots"
            lines.append(
                f"all {len(self.splits)} seeds have the same {what}: their figures say nothing of others, and have no"
                " interval"
            )
        lines += self._untested()
        if isinstance(source, FeatureFiles) and source.encoded_by is None and getattr(self.model, "encoded_by", None):
            more = f" and {len(source.paths) - 1} more files" if len(source.paths) > 1 else ""
            lines.append(
                EncodedBy.unstated(f"{source.paths[0]}{more}", "that of the features that the fit learned from")
            )
        if isinstance(source, FeatureFiles) and source.rescaled:
            lines.append(f"features of length {source.shortest:.4g} to {source.longest:.4g} are scaled to length 1")
        model = self.config.model
        if model.precomputed and model.class_embeddings is not None and model.logit_scale is None:
            lines.append(
                f"the logit scale of the features' model is not known, and {LOGIT_SCALE:g} is taken, that of OpenAI's"
                " models: model.logit_scale sets it"
            )
        lines += [] if self.known else row_notes(self.images, self.model, supports(self.splits))
        lines += self.model.notes(self.images.class_names, self.config.data.templates)
        if count := self.given_views or (0 if self.crops is None else self.crops.count):
            several = f"{count} random crops" if count > 1 else "1 random crop"
            asked = views_of(self.config.fit_options, self._shots)
            fewer = f" (its file holds no more, and tune.views asks for {asked})" if count < asked else ""
            lines.append(f"heads learn from each shot and {several} of it{fewer}, which count as one picture")
        return lines

    def _untested(self) -> list[str]:
        """Sentences on classes that test sets have no picture of."""
        split, labels = next(iter(self.splits.values())), self.images.labels
        if not len(split.id_test) and not split.ood:
            return []  # a search does not look at them
        lacking: dict[tuple[int, ...], list[str]] = defaultdict(list)  # classes of the data, and the test sets without
        for where, rows in {"": split.id_test, **split.ood}.items():
            lacking[tuple(np.setdiff1d(labels, labels[rows]).tolist())].append(where)
        lacking.pop((), None)
        lines = []
        for lost, sets in lacking.items():
            named = ", ".join(spelled(self.images.class_names[n]) for n in lost[:8])
            more = f" and of {len(lost) - 8} more" if len(lost) > 8 else ""
            where = "" if "" in sets else f" of domain {', '.join(map(repr, sets))}"
            lines.append(f"no test picture{where} is of {named}{more}")
        return lines

    @property
    def crops(self) -> Crops | None:
        """Of the shots, that heads learn from; a stream is learned from as it comes."""
        return None if self.config.protocol == "stream" else crops_of(self.config.fit_options, self.model, self._shots)

    @cached_property
    def given_views(self) -> int:
        """How many crops of each shot heads learn from that are in files of features."""
        source = self.images.source
        if self.config.protocol == "stream" or not isinstance(source, FeatureFiles):
            return 0
        return given_views(self.config, source, self.images.rows[supports(self.splits)], self._shots)

    @property
    def _shots(self) -> int:
        """Of the largest support set."""
        return max(len(split.support) for split in self.splits.values())

    @property
    def identity(self) -> dict[str, Any]:
        """What weights trained on this belong to."""
        return identity_of(self.model, self.config.model, self.images.class_names, self.config.data.templates)


def open_task(
    config: Config,
    manifest: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
    *,
    draw: bool = True,
) -> Task:
    """Index the data set, draw the shots of every seed, load the model.

    Args:
        config: what is asked for.
        manifest: of a checkpoint that is to be used on the data; it knows which class embedding is whose.
        only: classes that are tested on; None is all.
        draw: whether shots are drawn; a fit that is tested, and keeps which were its own, needs none.

    Returns:
        The task.
    """
    resolve_templates(config.data.templates)
    whole = open_images(config.data, features=config.model.precomputed)
    images = _trained(config, whole)

    def choose(bad: frozenset[int]) -> dict[int, Split]:
        if draw:
            splits = {seed: select(images, config.data, seed, bad) for seed in config.seeds}
        else:
            splits = dict.fromkeys(config.seeds, select_tests(images, config.data, bad))
        return splits if only is None else {seed: _of_classes(images, split, only) for seed, split in splits.items()}

    return _task(config, images, whole, choose, manifest)


def open_shots(config: Config) -> Task:
    """Index the data set, draw the shots of every seed, load the model; test pictures are not looked at.

    Args:
        config: what is asked for.

    Returns:
        The task, its test sets empty.
    """
    resolve_templates(config.data.templates)
    whole = open_images(config.data, features=config.model.precomputed)
    images = _trained(config, whole)

    def choose(bad: frozenset[int]) -> dict[int, Split]:
        splits = {seed: select(images, config.data, seed, bad) for seed in config.seeds}
        return {seed: replace(split, id_test=split.id_test[:0], ood={}) for seed, split in splits.items()}

    return _task(config, images, whole, choose)


def open_tests(config: Config, given: Collection[str], manifest: Mapping[str, Any]) -> Task:
    """Index data that a fit was not trained on, load the model.

    Data that states no split is tested on as a whole. Its classes are the fit's by their names: in any order, and some
    may lack. Domains of the fit's own data that this data does not have are forgotten, unless they were given for it:
    then every picture is in distribution.

    Args:
        config: the fit's configuration, its data replaced.
        given: dotted keys that were given for this data.
        manifest: of the fit's checkpoint.

    Returns:
        The task, its support sets empty.
    """
    resolve_templates(config.data.templates)
    features, inherited = config.model.precomputed, "data.classes" not in given
    whole = open_images(config.data, test_fraction=1.0, features=features, absent=inherited)
    known = tuple(manifest["class_names"])
    halved = config.protocol == "bng" and inherited
    kept = [name for name in whole.class_names if name in known] if halved else whole.class_names
    images = arrange(restrict(whole, kept), known)
    whole = replace(whole, notes=images.notes)
    domains = set(images.domains.tolist())
    data, own = _known_domains(config.data, domains, given), config.data.train_domain
    if own is not None and data.train_domain is None and domains != {"all"}:  # which data without domains have
        named = ", ".join(sorted(domains - set(data.ood_domains or ())))
        sentence = f"no picture is of the domain {own}, which the fit learned: figures in distribution are of {named}"
        whole = replace(whole, notes=(*whole.notes, sentence))

    def choose(bad: frozenset[int]) -> dict[int, Split]:
        return dict.fromkeys(config.seeds, select_tests(images, data, bad))

    return _task(config, images, whole, choose, manifest)


def _trained(config: Config, whole: ImageSet) -> ImageSet:
    """The classes of a data set that the protocol trains on.

    Raises:
        DataError: there is only one class.
    """
    if len(whole.class_names) < 2:
        read = f" ({whole.notes[0]})" if whole.notes and "class/" in whole.notes[0] else ""
        raise DataError(
            f"the data has one class, {whole.class_names[0]!r}{read}: a classifier needs two or more:"
            " add pictures of others"
        )
    return restrict(whole, halves(whole.class_names)[0]) if config.protocol == "bng" else whole


def _of_classes(images: ImageSet, split: Split, names: Collection[str]) -> Split:
    """Leave test pictures of other classes out.

    Raises:
        DataError: a class is unknown, or a test set has no pictures of these.
    """
    chosen = np.isin(images.rows, restrict(images, tuple(names)).rows)
    id_test, ood = split.id_test[chosen[split.id_test]], {d: rows[chosen[rows]] for d, rows in split.ood.items()}
    for where, rows in [("in distribution", id_test), *((f"of the domain {d}", rows) for d, rows in ood.items())]:
        if not len(rows):
            raise DataError(f"no test pictures {where} are of {', '.join(names)}: name other classes in data.classes")
    return replace(split, id_test=id_test, ood=ood)


def _known_domains(data: DataConfig, known: set[str], given: Collection[str]) -> DataConfig:
    """Leave out domains that are unknown, and were not given."""
    if "data.train_domain" not in given and data.train_domain not in known:
        data = replace(data, train_domain=None)
    if "data.order" not in given and not known >= set(data.order or ()):
        data = replace(data, order=None)
    inherited = "data.ood_domains" not in given
    if inherited and (data.train_domain is None or not known >= set(data.ood_domains or ())):
        data = replace(data, ood_domains=None)
    return data


def _task(
    config: Config, images: ImageSet, whole: ImageSet, choose: Choose, manifest: Mapping[str, Any] | None = None
) -> Task:
    splits, source = choose(frozenset()), whole.source
    model: AnyModel
    if isinstance(source, FeatureFiles):
        config = replace(config, model=stated_model(config.model, source, manifest))
        model = given_model(config.model, source, whole, manifest)
    else:
        model = load_model(config.model)
        config = replace(config, data=replace(config.data, templates=_templates(config, whole, manifest)))
    from_pictures = isinstance(model, ClipModel) and config.tune.images and _trains_image_tower(config, images, model)
    return Task(config, images, whole, choose, splits, model, from_pictures, manifest is not None)


def _templates(config: Config, whole: ImageSet, manifest: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The prompts of a run, and how they say the names of its classes: of a fit that is there, as it was trained."""
    given = config.data.templates
    if manifest is None:
        return worded(given, whole.class_names)
    kept = tuple(manifest["templates"])
    return kept if same_sentences(kept, given) else given


def _trains_image_tower(config: Config, images: ImageSet, model: ClipModel) -> bool:
    """Whether fits do, and not the text tower alone; refuses what they would, before pictures are encoded."""
    network = CLIPNetwork(
        model,
        images.class_names[:1],
        config.data.templates,
        config.tune,
        config.adapter,
        pairs=config.fit_options.pairs,
        class_embeddings=torch.zeros(1, model.embed_dim),
    )
    if config.method == "kalman":
        check_affordable(config.posterior, network)
    return network.image_trained


def one_support(splits: Mapping[int, Split], *, ordered: bool) -> bool:
    """Whether several seeds all drew the same shots.

    Args:
        splits: by seed.
        ordered: whether their order makes them others, as in a stream.

    Returns:
        Whether figures over these seeds say nothing of other shots.
    """
    drawn = [split.support if ordered else np.sort(split.support) for split in splits.values()]
    return len(drawn) > 1 and len(drawn[0]) > 0 and all(np.array_equal(drawn[0], other) for other in drawn[1:])


def supports(splits: Mapping[int, Split]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The shots of all seeds, each once, in ascending order."""
    return np.unique(np.concatenate([split.support for split in splits.values()]))
