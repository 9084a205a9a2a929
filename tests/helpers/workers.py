"""The processes of Ray Train's workers, to be killed."""

from contextlib import suppress

import psutil


def own_workers() -> list[psutil.Process]:
    """The Ray Train workers below this process, oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append((process.create_time(), process.pid, process))
    return [process for *_, process in sorted(found)]
