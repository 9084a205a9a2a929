"""What a run takes of its machine, sampled while it goes on; MLflow shows it under system metrics."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from kngd_ray.tracking._files import SYSTEM, cut_torn_line

logger = logging.getLogger(__name__)

_MB = 1e6


class SystemMonitor:
    """Samples processor, memory, disk, network and GPUs of this machine into a record, from a thread of its own.

    The names are those of MLflow's own monitor. GPUs are seen where ``nvidia-ml-py`` is installed. A sample that cannot
    be taken or written is left out: the run goes on.

    Args:
        folder: of the record.
        every_s: seconds between samples; the last is taken at the end.
    """

    def __init__(self, folder: Path, every_s: float = 10.0) -> None:
        self._path = folder / SYSTEM
        self._every = every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="kngd_ray system monitor", daemon=True)

    def __enter__(self) -> "SystemMonitor":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()

    def _loop(self) -> None:
        try:
            cut_torn_line(self._path)
            step = self._path.read_bytes().count(b"\n") if self._path.is_file() else 0  # of a run that is continued
            sample = _sampler()
            ended = False
            while not ended:
                ended = self._closing.wait(self._every)
                line = {"step": step, "time": time.time_ns() // 1_000_000, "metrics": sample()}
                with self._path.open("ab") as file:
                    file.write(json.dumps(line).encode() + b"\n")
                step += 1
        except Exception:  # whatever a machine does not tell, or a full disk
            logger.debug("system metrics end here", exc_info=True)


def _sampler() -> Callable[[], Mapping[str, float]]:
    """What takes a sample; network traffic counts from now, the processor's load from the sample before."""
    before: Any = psutil.net_io_counters()  # None where there is no network
    psutil.cpu_percent()
    gpus = _gpus()

    def sample() -> Mapping[str, float]:
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters() or before
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / _MB,
            "disk_available_megabytes": disk.free / _MB,
            **gpus(),
        }
        if network is not None:
            found["network_receive_megabytes"] = (network.bytes_recv - before.bytes_recv) / _MB
            found["network_transmit_megabytes"] = (network.bytes_sent - before.bytes_sent) / _MB
        return {f"system/{name}": round(value, 1) for name, value in found.items()}

    return sample


def _gpus() -> Callable[[], Mapping[str, float]]:
    """What asks NVIDIA's library of the GPUs; nothing where there is no library or no GPU."""
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return dict
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(n) for n in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return dict

    def ask() -> Mapping[str, float]:
        found = {}
        for n, handle in enumerate(handles):
            with suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                found[f"gpu_{n}_memory_usage_percentage"] = 100 * memory.used / memory.total
                found[f"gpu_{n}_memory_usage_megabytes"] = memory.used / _MB
            with suppress(nvml.NVMLError):  # a part of a GPU has none
                found[f"gpu_{n}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        return found

    return ask
