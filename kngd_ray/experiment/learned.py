"""Pictures that a fit has learned from: none of them is tested on, and none is learned from again unnoticed."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kngd_ray._run_layout import CONFIG
from kngd_ray.config import parse
from kngd_ray.data import ImageSet, Split
from kngd_ray.errors import CheckpointError, DataError
from kngd_ray.experiment.prepared import TaskData
from kngd_ray.experiment.task import Task
from kngd_ray.training.learned import DIGITS, MOST, Learned, read_learned
from kngd_ray.training.options import FitOptions
from kngd_ray.training.prior import Prior
from kngd_ray.training.resumable import newest_manifest

CHANGED = "the data or its splits were changed since the fit"
Keys = npt.NDArray[np.bytes_]
Say = Callable[[str], None]


def leave_out(task: Task, learned: Mapping[int, frozenset[str]], who: str, say: Say) -> Task:
    """Take the pictures that fits have learned from, and copies of them, out of their test sets.

    Args:
        task: the data, with the test sets of each seed.
        learned: by seed, the beginnings of the hashes of these pictures.
        who: has learned from them, for messages.
        say: told how many are left out.

    Returns:
        The task without them. A DataError tells of a test set of which nothing is left.
    """
    known = {seed: among(task.images, keys) for seed, keys in learned.items() if keys}

    def choose(bad: frozenset[int]) -> dict[int, Split]:
        splits = task.choose(bad)
        return splits | {seed: _without(task.images, splits[seed], here, who) for seed, here in known.items()}

    splits = choose(frozenset())
    out = {seed: _tested(task.splits[seed]) - _tested(split) for seed, split in splits.items()}
    if count := len(set().union(*out.values())):
        say(f"{count} test {_pictures(count)} left out: {who} has learned from {'it' if count == 1 else 'them'}")
    return replace(task, choose=choose, splits=splits)


def untested(task: Task, manifests: Iterable[Mapping[str, Any]], say: Say, *, as_it_was: bool) -> Task:
    """Leave out of the test sets of finished fits what they have learned from, or say that it is not known.

    Args:
        task: the data, with the test sets of each fit's seed.
        manifests: of the fits' checkpoints.
        say: told of what is left out, or cannot be.
        as_it_was: whether it is the data that the fits learned from, with its settings; see :func:`tell_changes`.

    Returns:
        The task without these pictures.
    """
    known, unknown = {}, set()
    for manifest in manifests:
        learned = read_learned(manifest)
        if learned is not None:
            known[manifest["seed"]] = learned.all
        if learned is None and not as_it_was:
            unknown.add("the fit")
        elif manifest.get("prior") is not None and (learned is None or not learned.complete):
            unknown.add("a fit that this one continues")
    if unknown:
        say(
            f"{' and '.join(sorted(unknown))} keeps no record of its shots, as those of earlier versions, of KalmanCLIP"
            f" and of more than {MOST:,} pictures do not: copies of them in the test sets cannot be told, see that"
            " there are none"
        )
    return leave_out(task, known, "the fit", say)


def check_names(task: Task, manifest: Mapping[str, Any], *, own: bool) -> None:
    """Refuse to name bare numbers by the classes that a fit chose among the names of its own data.

    Args:
        task: the data, with the run's own ``data.classes``.
        manifest: of the fit's checkpoint.
        own: whether it is the data that the fit learned from; of a fit that keeps no record, that is believed.

    Raises:
        DataError: labels are numbers, and the fit's were not, or it is not known.
    """
    learned = read_learned(manifest)
    if not task.whole.numbered or (own if learned is None else learned.numbered):
        return
    raise DataError(
        f"{task.whole.place(0)} has a number for a label and no class name, and the run's data.classes chose among the"
        " names of its own data: add a class_name column, or name the classes of label 0, 1, 2 and so on in"
        " data.classes"
    )


def tell_changes(prepared: TaskData, manifest: Mapping[str, Any], say: Say) -> None:
    """Say where a fit's own data, as it is now, would have given it other shots or other tests.

    Args:
        prepared: its own data, with its own settings.
        manifest: of its checkpoint.
        say: told of it.
    """
    seed, learned = manifest["seed"], read_learned(manifest)
    rows = prepared.splits[seed].support
    if learned is None:
        if not _drawn_again(prepared, manifest):
            say(
                "the data would give this fit other shots than it learned from, and it keeps no record of them: if the"
                " data or its splits were changed, figures may count pictures that it knows; train it again"
            )
        return
    keys = begun(prepared.images.keys[rows])
    if lost := len(keys - learned.shots):
        say(
            f"{CHANGED}: {lost} of the {len(rows)} shots that it would be given"
            " now are others, and figures cannot be compared with those of its run"
        )
    elif learned.tested not in {None, _tested_digest(prepared, seed)}:
        say("the test data was changed since the fit, and figures cannot be compared with those of its run")


def check_unchanged(prepared: TaskData, fits: Iterable[Path]) -> None:
    """Refuse to go on with a run whose data is not what it was: its figures would be of two data sets.

    Args:
        prepared: the run's data, as it is now.
        fits: folders of its fits, begun or not.

    Raises:
        CheckpointError: shots or tests are others.
    """
    for fit in fits:
        manifest = newest_manifest(fit)
        told: list[str] = []
        if manifest is not None:
            tell_changes(prepared, manifest, told.append)
        if told:
            raise CheckpointError(f"{fit.name}: {told[0]}: put the data back as it was, or start a new run.")


def _tested_digest(prepared: TaskData, seed: int) -> str:
    """Of the test pictures of all domains that a seed is tested on."""
    split = prepared.splits[seed]
    return prepared.images.test_digest({*prepared.images.domains[split.id_test].tolist(), *split.ood})


def tell_overlap(task: Task, priors: Mapping[int, Prior], say: Say) -> None:
    """Say how many shots of a run its prior has learned from already, and which seeds share a fit of it.

    Args:
        task: the run's data, with the shots of each seed.
        priors: by seed, what its fit continues from; empty for none.
        say: told of it.
    """
    if not priors:
        return
    folder = next(iter(priors.values())).folder
    name = next((place.name for place in folder.parents if (place / CONFIG).is_file()), folder.name)
    others = [seed for seed, prior in priors.items() if prior.manifest["seed"] != seed]
    if others:
        seeds, source = ", ".join(map(str, priors)), priors[others[0]].manifest["seed"]
        one = len(priors) == 1
        less = "" if one else ": an interval over seeds is of the new shots alone"
        say(f"{f'seed {seeds} continues' if one else f'seeds {seeds} all continue'} from seed {source} of {name}{less}")
    found = {seed: read_learned(prior.manifest) for seed, prior in priors.items()}
    if any(learned is None or not learned.complete for learned in found.values()):
        say(f"the prior {name}, or one before it, keeps no record of its shots: see that the new shots are others")
    shots = {seed: len(task.splits[seed].support) for seed in found}
    again = {
        seed: int(among(task.images, learned.all)[task.splits[seed].support].sum())
        for seed, learned in found.items()
        if learned is not None
    }
    if count := sum(again.values()):
        total = sum(shots.values())
        which = f"all {total} shots were" if count == total > 1 else f"{count} of the {total} shots were"
        say(
            f"warning: {which} already learned from by the prior {name} and count twice: new data, another domain or"
            " another seed gives others"
        )


def known_to(priors: Iterable[Mapping[int, Prior]]) -> dict[int, frozenset[str]]:
    """What the fits that a run continues from have learned from.

    Args:
        priors: of each of its methods, by seed.

    Returns:
        By seed, the beginnings of the hashes of these pictures.
    """
    found: dict[int, frozenset[str]] = {}
    for by_seed in priors:
        for seed, prior in by_seed.items():
            learned = read_learned(prior.manifest)
            found[seed] = found.get(seed, frozenset()) | (frozenset() if learned is None else learned.all)
    return found


def learned_by(prepared: TaskData, seed: int, prior: Prior | None) -> Learned | None:
    """What a fit of a run learns from.

    Args:
        prepared: the run's data.
        seed: of the fit.
        prior: what it continues from.

    Returns:
        The same, for its checkpoints; None if it is too much to be kept.
    """
    shots = begun(prepared.images.keys[prepared.splits[seed].support])
    before = None if prior is None else read_learned(prior.manifest)
    earlier: frozenset[str] = frozenset() if before is None else before.all
    complete = prior is None or (before is not None and before.complete)
    if len(shots) > MOST:
        return None
    if len(shots) + len(earlier) > MOST:
        earlier, complete = frozenset(), False
    return Learned(shots, earlier, complete, prepared.images.numbered, _tested_digest(prepared, seed))


def begun(keys: Keys) -> frozenset[str]:
    """The beginnings of hashes, as fits keep them.

    Args:
        keys: (N,) hashes of pictures.

    Returns:
        Each once.
    """
    return frozenset(np.char.decode(keys.astype(f"S{DIGITS}"), "ascii").tolist())


def among(images: ImageSet, keys: frozenset[str]) -> npt.NDArray[np.bool_]:
    """Look for pictures that have been learned from.

    Args:
        images: the data set.
        keys: beginnings of the hashes of these pictures.

    Returns:
        Which of the data set's (N,) they are.
    """
    wanted = np.array(sorted(keys), f"S{DIGITS}")
    return np.isin(images.keys.astype(f"S{DIGITS}"), wanted)


def _without(images: ImageSet, split: Split, known: npt.NDArray[np.bool_], who: str) -> Split:
    """Test sets without known pictures.

    Raises:
        DataError: nothing is left of one.
    """
    left = replace(
        split,
        id_test=split.id_test[~known[split.id_test]],
        ood={domain: rows[~known[rows]] for domain, rows in split.ood.items()},
    )
    for where, rows in [("in distribution", left.id_test), *((f"of the domain {d}", r) for d, r in left.ood.items())]:
        if not len(rows):
            raise DataError(
                f"{who} has learned from all pictures {where} that would be tested on, or from copies of them:"
                " name data with others in data.path"
            )
    return left


def _tested(split: Split) -> set[int]:
    return set(np.concatenate([split.id_test, *split.ood.values()]).tolist())


def _pictures(count: int) -> str:
    return "picture is" if count == 1 else "pictures are"


def _drawn_again(prepared: TaskData, manifest: Mapping[str, Any]) -> bool:
    """Whether shots that are drawn again are those of a fit that keeps no record of them, by their features."""
    support = prepared.support(manifest["seed"])
    digest, shots, head = hashlib.sha256(support.digest()), manifest["shots"], manifest.get("head")
    if not isinstance(shots, dict):
        return False
    if isinstance(head, dict):
        return bool(head.get("sha256") == digest.hexdigest())
    if parse(FitOptions, manifest["options"]).tune.images:  # their shots are pictures
        return bool(shots.get("count") == len(support))
    digest.update(prepared.class_embeddings.cpu().contiguous().numpy().tobytes())
    return bool(shots.get("sha256") == digest.hexdigest())
