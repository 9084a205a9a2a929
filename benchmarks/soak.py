"""An hour of ``kngd-ray train`` jobs, one after another, on one Ray instance: does anything grow?

    python -m benchmarks.soak [--minutes 60]          runs it and keeps results/soak.json, after each job anew
    python -m benchmarks.soak --markdown              prints what is kept

A head is started by ``ray start --head`` with token authentication, as a cluster has it, and each job is a command
that joins it: the odd ones with one rank and cached features, the even ones with two ranks and pictures that Ray Data
encodes anew. When a job has gone and the processes have settled, all processes of the instance are looked at: how many,
their file handles, threads, resident memory, shared memory, and what the object store holds. After a warm-up (a fifth
of the jobs, at least five) a line is fitted to each figure, over ten means of jobs in a row, since one job's figure is
like that of the job before. A figure grows beyond noise where the 99 % interval of its slope lies above 0.
"""

import argparse
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import stats

from kngd_ray.experiment.environment import describe_environment

RESULTS = Path(__file__).parent / "results" / "soak.json"
_MARK = "KNGD_SOAK"  # of the environment of all processes of this instance
_BLOCKS = 10
_SETTLE_SECONDS = 30.0
_MB = 1e6


def small_data(folder: Path) -> Path:
    """Four classes of the shipped emoji, a few pictures of each."""
    with resources.as_file(resources.files("kngd_ray") / "assets" / "emoji.parquet") as path:
        table = pq.read_table(path, columns=["image", "class_name", "domain", "split"])
    kept = pc.and_(pc.is_in(table["class_name"], pc.unique(table["class_name"])[:4]), pc.equal(table["domain"], "noto"))
    pq.write_table(table.filter(kept), folder / "small.parquet")
    return folder / "small.parquet"


@contextmanager
def head(folder: Path, cpus: int) -> Iterator[tuple[dict[str, str], str, int]]:
    """A Ray head with token authentication; the environment, the address and the port of its metrics."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = free.getsockname()[1]
    environment = {
        **os.environ,
        _MARK: folder.name,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
    command += [f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--dashboard-port=0"]
    command += [f"--temp-dir={folder / 'ray'}", f"--metrics-export-port={metrics}"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        current = folder / "ray" / "ray_current_cluster"
        deadline = time.monotonic() + 120
        while not current.is_file() or not current.read_text().strip():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((folder / "head.log").read_text())
            time.sleep(0.2)
        time.sleep(5)  # the agents come up after the address is known
        yield environment, current.read_text().strip(), metrics
    finally:
        for process in instance(folder.name):
            process.kill()


def instance(mark: str) -> list[psutil.Process]:
    """All processes that this instance has started, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def settled(mark: str) -> tuple[list[psutil.Process], float]:
    """The processes when their number has not changed for 5 s, and how long that took."""
    began = last = time.monotonic()
    found = instance(mark)
    while time.monotonic() - last < 5 and time.monotonic() - began < _SETTLE_SECONDS:
        time.sleep(1)
        now = instance(mark)
        if {p.pid for p in now} != {p.pid for p in found}:
            last = time.monotonic()
        found = now
    return found, last - began


def look(mark: str, metrics: int) -> dict[str, float]:
    """The figures of this moment."""
    processes, seconds = settled(mark)
    figures: dict[str, float] = {"processes": 0, "file handles": 0, "threads": 0, "RSS MB": 0, "shared memory MB": 0}
    zombies = 0
    for process in processes:
        try:
            with process.oneshot():
                rss, role = process.memory_info().rss / _MB, role_of(process)
                handles, threads = process.num_fds(), process.num_threads()
                shared = _shmem(process.pid)
                zombies += sum(child.status() == psutil.STATUS_ZOMBIE for child in process.children())
        except (psutil.Error, OSError):
            continue
        figures["processes"] += 1
        figures["file handles"] += handles
        figures["threads"] += threads
        figures["RSS MB"] += rss
        figures["shared memory MB"] += shared
        figures[f"RSS MB of {role}"] = figures.get(f"RSS MB of {role}", 0) + rss
        figures[f"file handles of {role}"] = figures.get(f"file handles of {role}", 0) + handles
    figures["zombies"] = zombies
    figures["workers and actors"] = sum(_is_worker(process) for process in processes)
    figures["object store MB"] = object_store(metrics)
    figures["seconds to settle"] = seconds
    return {name: round(value, 3) for name, value in figures.items()}


def role_of(process: psutil.Process) -> str:
    """What a process of Ray is, in a word."""
    line = [part for part in process.cmdline() if part]
    if not line:
        return "gone"
    if line[0].startswith("ray::"):
        return f"ray::{re.split(r'[^A-Za-z_]', line[0].removeprefix('ray::'))[0]}"
    if line[0].startswith("ray-"):
        return re.split(r"[\s]", line[0])[0].rstrip("-0123456789.:")
    if "-c" in line:
        return "forkserver of the dashboard"
    scripts = [Path(part).stem for part in line if part.endswith(".py")]
    modules = [line[n + 1].rpartition(".")[2] for n, part in enumerate(line[:-1]) if part == "-m"]
    return next(iter([*modules, *scripts]), Path(line[0]).name)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return role_of(process).startswith("ray::")
    except psutil.Error:
        return False


def _shmem(pid: int) -> float:
    """Shared memory that a process has touched, in MB; pages that several have touched count for each."""
    found = re.search(r"RssShmem:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 / _MB if found else 0.0


def object_store(metrics: int) -> float:
    """What the object store holds, in MB, by Ray's own metrics; NaN where they do not answer."""
    try:
        with urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return float("nan")
    lines = [line for line in text.splitlines() if line.startswith("ray_object_store_used_memory")]
    lines = lines or [line for line in text.splitlines() if line.startswith("ray_object_store_memory")]
    return sum(float(line.rpartition(" ")[2]) for line in lines) / _MB if lines else float("nan")


def run_job(number: int, folder: Path, address: str, environment: Mapping[str, str]) -> tuple[float, str | None]:
    """One command that joins the instance; its seconds, and the last line of what it said if it failed."""
    cached = number % 2 == 1
    cache = folder / ("features" if cached else f"features-{number}")
    settings = [
        f"data.path={folder / 'small.parquet'}",
        "data.shots=4",
        "data.ood_domains=[]",
        f"data.cache_dir={cache}",
        f"trainer.address={address}",
        f"trainer.num_workers={1 if cached else 2}",
        "trainer.checkpoint_every=5",
        f"trainer.storage_path={folder / 'runs'}",
        f"trainer.name=job-{number}",
        f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
        "tracking.log_model=false",
    ]
    began = time.monotonic()
    # not of the instance: a command that stays is a fault of its own
    own = {key: value for key, value in environment.items() if key != _MARK}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kngd_ray.cli", "train", *settings, "--json"],
            capture_output=True,
            text=True,
            env=own,
            timeout=600,
            check=False,
        )
        failed = None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason"])[-1]
    except subprocess.TimeoutExpired:
        failed = "not done after 600 s"
    seconds = time.monotonic() - began
    shutil.rmtree(folder / "runs" / f"job-{number}", ignore_errors=True)
    if not cached:
        shutil.rmtree(cache, ignore_errors=True)
    return round(seconds, 1), failed


def growth(values: Sequence[float]) -> dict[str, Any]:
    """The slope of a figure by job after the warm-up, with its 99 % interval."""
    warm = max(5, len(values) // 5)
    kept = np.asarray(values[warm:], dtype=float)
    if len(kept) < 2 * _BLOCKS or np.isnan(kept).any():
        return {"jobs": len(kept), "mean": _rounded(np.mean(kept)) if len(kept) else None}
    means = [block.mean() for block in np.array_split(kept, _BLOCKS)]
    centres = [block.mean() for block in np.array_split(np.arange(len(kept), dtype=float), _BLOCKS)]
    fit = stats.linregress(centres, means)
    half = float(stats.t.ppf(0.995, _BLOCKS - 2)) * (fit.stderr if np.ptp(means) else 0.0)
    return {
        "jobs": len(kept),
        "mean": _rounded(kept.mean()),
        "most": _rounded(kept.max()),
        "per_job": _rounded(fit.slope),
        "low": _rounded(fit.slope - half),
        "high": _rounded(fit.slope + half),
        "grows": bool(fit.slope - half > 1e-9),
    }


def _rounded(value: float) -> float:
    return float(f"{float(value):.4g}")


def judged(samples: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Growth of every figure that all samples have."""
    names = [name for name in samples[-1] if all(name in sample for sample in samples)]
    return {name: growth([sample[name] for sample in samples]) for name in names}


def soak(minutes: float, cpus: int) -> dict[str, Any]:
    """Run jobs for so long; the report, which is also written after each job."""
    report: dict[str, Any] = {"minutes": minutes, "cpus": cpus, "jobs": [], "failed": []}
    report["environment"] = json.loads(describe_environment())
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="soak", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        small_data(folder)
        with head(folder, cpus) as (environment, address, metrics):
            began = time.monotonic()
            number = 0
            while time.monotonic() - began < minutes * 60:
                number += 1
                load = os.getloadavg()[0]
                seconds, failed = run_job(number, folder, address, environment)
                if failed is not None:
                    report["failed"].append({"job": number, "reason": failed})
                    if len(report["failed"]) > 5:
                        raise SystemExit(json.dumps(report["failed"], indent=1))
                samples.append(look(folder.name, metrics))
                report["jobs"].append({"seconds": seconds, "load": round(load, 1), **samples[-1]})
                report["ran_minutes"] = round((time.monotonic() - began) / 60, 1)
                report["growth"] = judged(samples)
                report["grows"] = [name for name, fit in report["growth"].items() if fit.get("grows")]
                logs = [file.stat().st_size for file in (folder / "ray").rglob("*") if file.is_file()]
                report["session_folder"] = {"files": len(logs), "MB": round(sum(logs) / _MB, 2)}
                RESULTS.write_text(json.dumps(report, indent=1) + "\n")
                print(f"job {number}: {seconds} s, {json.dumps(samples[-1])}", flush=True)
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """The table of a report."""
    head_of = ["figure", "mean", "most", "growth per job", "99 % interval", "beyond noise"]
    lines = [f"| {' | '.join(head_of)} |", "|---" * len(head_of) + "|"]
    for name, fit in judged(report["jobs"]).items():
        if "per_job" not in fit or name in ("seconds", "load", "seconds to settle"):
            continue
        interval = f"{fit['low']:+.3g} to {fit['high']:+.3g}"
        cells = [name, f"{fit['mean']:g}", f"{fit['most']:g}", f"{fit['per_job']:+.3g}", interval]
        lines.append(f"| {' | '.join(cells)} | {'yes' if fit['grows'] else 'no'} |")
    told = f"{len(report['jobs'])} jobs in {report['ran_minutes']} minutes, {len(report['failed'])} failed."
    return "\n".join([told, "", *lines])


def main() -> None:
    """Run, or print what is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    print(markdown(json.loads(RESULTS.read_text()) if args.markdown else soak(args.minutes, args.cpus)))


if __name__ == "__main__":
    main()
