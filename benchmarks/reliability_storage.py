"""Faults of storage and tracking, over and over: how many runs outlive them, and at what cost.

    python -m benchmarks.reliability_storage [--tries 10] [--only full read-only ...]     keeps results after each try
    python -m benchmarks.reliability_storage --markdown                                   prints what is kept

Each try of the first three is a run of real processes that the fault befalls at a random step, then its continuation;
it is survived if the continued run ends with bitwise the weights and covariance of a run that nothing befell, or, of a
tracking server, if every step is in the store exactly once. A try of the last is one flipped bit or one cut of a file,
survived if it is refused or harmless. Needs root: disks are mounted, each where only its try can see it.
"""

import argparse
import json
import logging
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.emoji import small_table
from helpers.hostile import Disk, program

from kngd_ray.data import DataConfig, FeatureCache, PictureFile, open_images
from kngd_ray.errors import KngdError
from kngd_ray.sharding import SingleProcess
from kngd_ray.storage import write_text
from kngd_ray.training import checkpoint
from kngd_ray.training.method import MethodState
from kngd_ray.training.resumable import latest

RESULTS = Path(__file__).parent / "results" / "reliability_storage.json"
STEPS = 120
FLIPS = 1000


class Tries:
    """What the tries share: data, features, and what a run ends with that nothing befell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pq.write_table(small_table(), folder / "small.parquet")
        self._run(program("train", *self.settings(folder / "whole", "whole")))
        self.whole = self.end(folder / "whole" / "whole")

    def settings(self, storage: Path, name: str, *more: str) -> list[str]:
        """Of a run of a few seconds with a checkpoint after each step."""
        return [
            f"data.path={self.folder}/small.parquet",
            "data.train_domain=noto",
            "data.shots=4",
            f"data.cache_dir={self.folder}/cache",
            "trainer.num_workers=0",
            "trainer.checkpoint_every=1",
            f"trainer.storage_path={storage}",
            f"trainer.name={name}",
            "tracking.enabled=false",
            f"epochs={STEPS // 3}",
            "batch_size=4",
            "posterior.folds=0",
            *more,
        ]

    @staticmethod
    def _run(command: list[str]) -> None:
        subprocess.run(command, check=True, capture_output=True, timeout=900)

    @staticmethod
    def end(run: Path) -> dict[str, bytes]:
        """The files of a run's final checkpoint."""
        found = latest(run / "fits" / "kalman-seed0")
        assert found is not None
        assert found.manifest["step"] == STEPS
        return {name: (found.folder / name).read_bytes() for name in found.manifest["files"]}

    def disk(self, words: str, fault: Callable[[Disk], None], mend: Callable[[Disk], None]) -> bool:
        """Let a fault of the disk befall a run; whether the run told of it in one sentence and lost nothing."""
        step = random.randrange(2, STEPS // 2)
        place = Path(tempfile.mkdtemp(dir=self.folder))
        with Disk(place, 48) as disk:
            fits = disk.inside / "hit" / "fits"
            command = disk.command(*program("train", *self.settings(place, "hit")))
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            steps = re.compile(r"step-(\d+)")
            while process.poll() is None:
                found = [int(m[1]) for path in fits.glob("*/step-*") if (m := steps.match(path.name))]
                if max(found, default=0) >= step:
                    break
                time.sleep(0.002)
            fault(disk)
            _, said = process.communicate(timeout=900)
            told = process.returncode == 1 and said.splitlines()[-1].startswith("kngd-ray: ") and words in said
            told = told and "Traceback" not in said and latest(fits / "kalman-seed0") is not None
            mend(disk)
            self._run(disk.command(*program("train", "--resume", place / "hit")))
            return bool(told and self.end(disk.inside / "hit") == self.whole)

    def full(self) -> bool:
        """Take all room from a run."""
        return self.disk("no space left", Disk.fill, Disk.clear)

    def read_only(self) -> bool:
        """Let the folder of a run's checkpoints turn read-only."""
        return self.disk(
            "Read-only", lambda disk: disk.freeze("hit/fits"), lambda disk: disk.freeze("hit/fits", frozen=False)
        )

    def server(self) -> bool:
        """Kill the tracking server in mid-run, and start it again after some seconds."""
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cli"))
        from test_tracking_outage import Server, begun, finished, nothing_is_missing, sync

        place = Path(tempfile.mkdtemp(dir=self.folder))
        server = Server(place)
        try:
            process = begun(server, self.folder / "small.parquet", self.folder / "cache", place / "runs", epochs=500)
            server.kill()
            time.sleep(random.uniform(5, 30))
            server.start()
            if "kngd-ray sync" in finished(process):
                sync(place / "runs")
            nothing_is_missing(server, 3 * 500)
        except AssertionError as error:
            print(error)
            return False
        finally:
            server.kill()
        return True


def flips() -> dict[str, Callable[[random.Random], bool]]:
    """By the kind of file: flip a bit or cut it somewhere; whether that is refused, or changes nothing that is read."""
    folder = Path(tempfile.mkdtemp(prefix="kngd-flips-"))
    state = MethodState({"a": torch.randn(40, 30)}, {"n": torch.tensor(4)}, {"a": torch.ones(1200)}, [{"a": (0, 1200)}])
    checkpoint.save(folder / "c", state, {"step": 4, "class_names": ["a", "b"]}, SingleProcess())
    keys = np.array([b"%064d" % n for n in range(64)], "S64")
    features = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    FeatureCache(folder, "key", 8).write(keys, features)
    (part,) = (folder / "key").iterdir()
    whole_part = part.read_bytes()
    pq.write_table(small_table().slice(0, 12), folder / "x.parquet")
    images = open_images(DataConfig(path=str(folder / "x.parquet")))
    PictureFile.write(folder / "x.arrow", images, range(12))
    blobs = dict(images.read(range(12)))

    def spoilt(path: Path, dice: random.Random, read: Callable[[], bool]) -> bool:
        whole = path.read_bytes()
        data = bytearray(whole)
        at = dice.randrange(len(data))
        if dice.random() < 0.8:
            data[at] ^= 1 << dice.randrange(8)
        else:
            del data[at:]
        path.write_bytes(data)
        try:
            return read()
        except KngdError as error:
            return "\n" not in str(error)
        finally:
            path.write_bytes(whole)

    def of_checkpoint(dice: random.Random) -> bool:
        path = dice.choice(sorted((folder / "c").iterdir()))
        return spoilt(
            path, dice, lambda: torch.equal(checkpoint.load(folder / "c").state.weights["a"], state.weights["a"])
        )

    def of_cache(dice: random.Random) -> bool:
        def read() -> bool:
            cache = FeatureCache(folder, "key", 8)
            whole = not cache.missing(keys) and np.array_equal(cache.read(keys), features)
            aside = part.with_suffix(".corrupt")
            if aside.exists():  # and would be computed again
                aside.unlink()
                part.write_bytes(whole_part)
                return True
            return bool(whole)

        return spoilt(part, dice, read)

    def of_pictures(dice: random.Random) -> bool:
        def read() -> bool:
            pictures = PictureFile.open(folder / "x.arrow")
            return [pictures.read(n) for n in range(len(pictures))] == [blobs[n] for n in range(12)]

        return spoilt(folder / "x.arrow", dice, read)

    return {"checkpoint": of_checkpoint, "feature cache": of_cache, "file of pictures": of_pictures}


HOLDS = {
    "full": ("storage path full in mid-run", "one sentence, last checkpoint good, resumed bitwise"),
    "read-only": ("storage path read-only in mid-run", "one sentence, last checkpoint good, resumed bitwise"),
    "server": ("MLflow server killed, back after 5 to 30 s", "every step in the store exactly once"),
}


def note(rows: list[dict[str, Any]], fault: str, must_hold: str, tries: int, survived: int, seconds: float) -> None:
    """Add tries to a row, and keep all rows."""
    row = next((r for r in rows if r["fault"] == fault), None)
    if row is None:
        row = {"fault": fault, "must_hold": must_hold, "tries": 0, "survived": 0, "lost": 0, "seconds": []}
        rows.append(row)
    row["tries"] += tries
    row["survived"] += survived
    row["lost"] += tries - survived
    row["seconds"].append(round(seconds, 2))
    write_text(RESULTS, json.dumps(rows, indent=1) + "\n")
    print(f"{fault}: {row['survived']} of {row['tries']} survived", flush=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the documentation."""
    lines = ["| fault | must hold | tries | survived | lost |", "| --- | --- | ---: | ---: | ---: |"]
    lines += ["| {fault} | {must_hold} | {tries} | {survived} | {lost} |".format(**row) for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    logging.disable(logging.WARNING)  # of each damaged part of a cache
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10, help="of each fault of a disk; half as many of the server")
    parser.add_argument("--only", nargs="+", choices=[*HOLDS, "flips"], default=[*HOLDS, "flips"])
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if arguments.markdown:
        print(markdown(rows))
        return
    if "flips" in arguments.only:
        for kind, spoil in flips().items():
            fault = f"bit flip or cut in a {kind}"
            if any(row["fault"] == fault for row in rows):
                continue
            dice, began = random.Random(0), time.monotonic()
            survived = sum(spoil(dice) for _ in range(FLIPS))
            note(rows, fault, "refused by name, or harmless", FLIPS, survived, time.monotonic() - began)
    wanted = [name for name in arguments.only if name != "flips"]
    if not wanted:
        return
    with tempfile.TemporaryDirectory(prefix="kngd-storage-") as folder:
        tries = Tries(Path(folder))
        for name in wanted:
            fault, must_hold = HOLDS[name]
            most = arguments.tries if name != "server" else max(1, arguments.tries // 2)
            done = next((row["tries"] for row in rows if row["fault"] == fault), 0)
            for _ in range(done, most):
                began = time.monotonic()
                survived = getattr(tries, name.replace("-", "_"))()
                note(rows, fault, must_hold, 1, int(survived), time.monotonic() - began)


if __name__ == "__main__":
    main()
