"""What a run was computed with, kept beside its figures: versions, hardware and data."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kngd_ray.data import DataConfig, ImageSet

_PACKAGES = ("kngd_ray", "torch", "torchvision", "open_clip_torch", "ray", "mlflow", "pyarrow", "numpy")


def describe_environment() -> str:
    """Versions of Python and of the packages that decide a run's figures, processor and GPUs.

    Returns:
        JSON text.
    """
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # not installed where only the packages above ray_jobs are used
            continue
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    machine = {"platform": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}
    return json.dumps({"python": platform.python_version(), "packages": versions, **machine}, indent=1)


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
