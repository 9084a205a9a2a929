"""What a run was computed with: versions and hardware, kept beside its figures."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

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
