"""The versions, hardware and data that a run was computed with."""

import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kngd_ray.data import DataConfig, ImageSet

_PACKAGES = ("kngd_ray", "torch", "torchvision", "open_clip_torch", "ray", "mlflow", "pyarrow", "numpy")
_GIT_SECONDS = 5


def describe_environment() -> str:
    """Versions of Python and of the packages that decide a run's figures, processor and GPUs.

    Returns:
        JSON text.
    """
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # not installed here
            continue
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    machine = {"platform": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}
    return json.dumps({"python": platform.python_version(), "packages": versions, **machine}, indent=1)


@cache
def source_tags() -> dict[str, str]:
    """The commit of this package's code if it is a git checkout, in MLflow's tags.

    Returns:
        Tags, of which ``mlflow.git.dirty`` says whether files of the package are not as in the commit; none where the
        package was installed, and its version is all there is to say.
    """
    package = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(package), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)  # noqa: S603
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return None  # no git, no checkout, or one of another user
        return done.stdout.strip()

    # tracked: an environment inside somebody else's checkout is no part of it
    if git("ls-files", "--error-unmatch", "__init__.py") is None or (commit := git("rev-parse", "HEAD")) is None:
        return {}
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return {"mlflow.source.git.commit": commit, **({"mlflow.git.dirty": "true"} if changed else {})}


def describe_data(images: ImageSet, data: DataConfig, model: str) -> dict[str, Any]:
    """Describe a data set as :meth:`~kngd_ray.tracking.Record.log_input` takes it.

    Args:
        images: the data set.
        data: where it is from.
        model: name of the CLIP model that it is learned with.

    Returns:
        ``name``, ``digest``, ``source`` and ``profile``.
    """
    counts = {split: int((images.splits == split).sum()) for split in ("train", "test")}
    classes, domains = len(images.class_names), sorted(set(images.domains.tolist()))
    return {
        "name": data.name,
        "digest": images.digest,
        "source": data.path if isinstance(data.path, str) else ", ".join(data.path),
        "profile": {"classes": classes, "domains": domains, "model": model, **counts},
    }
