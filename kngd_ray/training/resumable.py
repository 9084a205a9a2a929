"""A fit that leaves checkpoints in a folder and goes on from the newest one that can be believed.

Each checkpoint has a folder of its own, named by step and attempt, so that a resumed run never
writes over what it resumed from::

    <folder>/step-00000020-3fa9c1/    see :mod:`~kngd_ray.training.checkpoint`
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kngd_ray.errors import CheckpointError
from kngd_ray.sharding import Group
from kngd_ray.training import checkpoint
from kngd_ray.training.fit import FitTask, StepRecord, fit
from kngd_ray.training.learned import LEARNED
from kngd_ray.training.method import Method

logger = logging.getLogger(__name__)

SOURCE = "source"  # of a description: where the model was loaded from, which may change; its fingerprint may not
_KEPT = 2  # the newest, and one more in case the newest is found damaged
_NAME = re.compile(r"step-(\d{8})-[0-9a-f]{6}")


def run_fit(
    task: FitTask,
    folder: Path,
    identity: Mapping[str, Any],
    group: Group,
    device: torch.device | str,
    *,
    checkpoint_every: int,
    on_step: Callable[[StepRecord], None] | None = None,
    before_checkpoint: Callable[[], None] | None = None,
) -> Path:
    """Run a fit, or the rest of it, with checkpoints.

    A fit that is resumed on the same number of ranks ends with bitwise the weights and covariance of
    one that never stopped: batches and random numbers are functions of seed and step, and all else
    is in the checkpoint.

    Args:
        task: what to fit.
        folder: where the checkpoints of this fit live, shared by all ranks.
        identity: JSON data that says what the weights belong to (model, classes); a checkpoint of
            another identity is refused.
        group: the ranks.
        device: where to compute.
        checkpoint_every: steps between checkpoints; 0 is only at the end.
        on_step: called with every step.
        before_checkpoint: called before each checkpoint is written.

    Returns:
        The folder of the final checkpoint.

    Raises:
        CheckpointError: the folder holds checkpoints of another task.
    """
    description = describe(task, identity)
    kept = {} if task.learned is None else {LEARNED: task.learned.entry()}  # fits of earlier versions go on without
    found = latest(folder)
    _agree(found, group, device)
    final = task.sampler.steps
    if found is not None:
        check_same(found.manifest, description, found.folder)
        if found.manifest["step"] == final:
            return found.folder
    written = [] if found is None else [found.folder]

    def write(step: int, method: Method) -> None:
        if before_checkpoint is not None:
            before_checkpoint()
        target = folder / f"step-{step:08d}-{_attempt(group, device)}"
        checkpoint.save(target, method.state(), {**description, **kept, "step": step, "steps": final}, group)
        written.append(target)
        if group.rank == 0:
            _prune(folder, keep=written[-_KEPT:] if step < final else [target])

    resume = None if found is None else (found.manifest["step"], found.state)
    fit(
        task,
        group=group,
        device=device,
        resume=resume,
        on_step=on_step,
        on_checkpoint=write,
        checkpoint_every=checkpoint_every,
    )
    return written[-1]


def describe(task: FitTask, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's weights belong to, as JSON data.

    Args:
        task: the fit.
        identity: model and classes.

    Returns:
        Entries of the manifest, the same for the same task.
    """
    options: dict[str, Any] = _listed(asdict(task.options))
    sha = hashlib.sha256(task.support.digest())
    sha.update(task.class_embeddings.cpu().contiguous().numpy().tobytes())
    shots = {"count": len(task.support), "sha256": sha.hexdigest()}
    prior = None if task.prior is None else task.prior.sha256
    order: dict[str, Any] = {"order": "prequential"} if task.prequential else {}
    if task.stream is not None:  # where stages cut batches short: steps of earlier versions were of other batches
        cut = task.sampler.cut_short
        order = {"order": "stream", **({"ends": cut} if cut else {})}
    if task.head is not None:
        features = hashlib.sha256(task.head.support.digest()).hexdigest()
        order = {**order, "head": {"options": _listed(asdict(task.head.options)), "sha256": features}}
    return {"seed": task.seed, "options": options, "shots": shots, "prior": prior, **order, **_listed(dict(identity))}


def check_same(manifest: Mapping[str, Any], description: Mapping[str, Any], place: Path) -> None:
    """Refuse a checkpoint of another task.

    Args:
        manifest: of the checkpoint.
        description: of the task at hand, or a part of it.
        place: the checkpoint, for the message.

    Raises:
        CheckpointError: an entry differs; names the first.
    """
    for key, expected in description.items():
        if key != SOURCE and manifest.get(key) != expected:
            _, found, wanted = _differing(key, manifest.get(key), expected)
            raise CheckpointError(
                f"{place} belongs to another task: its {key} is {found}, this one's is {wanted}; "
                "give the run another trainer.name, or the settings that it was started with."
            )


def check_scored(manifest: Mapping[str, Any], identity: Mapping[str, Any], place: Path) -> None:
    """Refuse to score a checkpoint with another model, other prompts or other classes than it was trained with.

    Args:
        manifest: of the checkpoint.
        identity: of the data and the model at hand.
        place: the checkpoint, for the message.

    Raises:
        CheckpointError: an entry differs; names the first.
    """
    for key, expected in identity.items():
        if key == SOURCE or manifest.get(key) == expected:
            continue
        name, found, wanted = _differing(key, manifest.get(key), expected)
        before, now = manifest.get(SOURCE), identity.get(SOURCE)
        if key == "model" and before != now:  # a setting says more than a fingerprint
            name, found, wanted = _differing(key, before, now)
        found, wanted = (value if value is None else _brief(value) for value in (found, wanted))
        raise CheckpointError(
            f"{place} belongs to another task than is to be scored: it was trained with {name}={found}, and here it is"
            f" {wanted}; a fit is scored with its own model, classes and prompts: leave out what changes it, or put"
            " back the files that it was trained with."
        )


def newest_manifest(folder: Path) -> dict[str, Any] | None:
    """What the newest checkpoint in a folder says of itself, without its tensors.

    Args:
        folder: checkpoints of one fit.

    Returns:
        The manifest; None if there is none that can be read.
    """
    for place in sorted(folder.glob("step-*"), reverse=True):
        try:
            return checkpoint.read_manifest(place)
        except CheckpointError:  # of a checkpoint that was cut short
            continue
    return None


def latest(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest checkpoint in a folder that verifies; damaged ones are passed over with a warning.

    Args:
        folder: checkpoints of one fit.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        VersionError: the newest was written by another version of kngd_ray.
    """
    names = (
        sorted((p.name for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True) if folder.is_dir() else []
    )
    for name in names:
        try:
            return checkpoint.load(folder / name)
        except checkpoint.VersionError:
            raise  # it is not damaged: a run that began again would delete it
        except CheckpointError as error:
            logger.warning("passed over a checkpoint: %s", error)
    return None


def _agree(found: checkpoint.Checkpoint | None, group: Group, device: torch.device | str) -> None:
    """Refuse to go on from different checkpoints: a rank whose view of the folder lags would wait for ever.

    Raises:
        CheckpointError: the ranks do not see the same one.
    """
    step = -1 if found is None else found.manifest["step"]
    steps = group.gather_rows(torch.tensor([[step]], device=device), [1] * group.world_size).flatten().tolist()
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the ranks see different newest checkpoints (steps {steps}, -1 is none): trainer.storage_path must be one "
            "folder that all nodes share, and readable on each."
        )


def _attempt(group: Group, device: torch.device | str) -> str:
    """Six hexadecimal digits that all ranks agree on and no earlier attempt had."""
    token = torch.randint(1 << 24, (1,), generator=_fresh()) if group.rank == 0 else torch.zeros(1, dtype=torch.long)
    return f"{int(group.sum(token.to(device))):06x}"


def _fresh() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _prune(folder: Path, keep: list[Path]) -> None:
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and path not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _listed(value: Any) -> Any:
    """JSON's view of nested data: tuples are lists."""
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _brief(value: Any) -> str:
    """A value as far as a sentence has room for it."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _differing(name: str, found: Any, expected: Any) -> tuple[str, Any, Any]:
    """The innermost entries at which two nested values differ, and their dotted name."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in expected:
            if found.get(key) != expected[key]:
                return _differing(f"{name}.{key}", found.get(key), expected[key])
    return name, found, expected
