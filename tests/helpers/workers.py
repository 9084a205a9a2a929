"""The processes that Ray starts for a job: its workers, to be killed, and others, to be looked at."""

from contextlib import suppress

import psutil


def own_workers() -> list[psutil.Process]:
    """The Ray Train workers below this process, oldest first."""
    return own_processes("RayTrainWorker")


def own_processes(title: str) -> list[psutil.Process]:
    """The processes below this one that Ray gave such a title, oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if title in " ".join(process.cmdline()):
                found.append((process.create_time(), process.pid, process))
    return [process for *_, process in sorted(found)]
