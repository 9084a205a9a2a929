"""What the 90 % intervals of ``predict`` hold, measured on test pictures.

    python -m benchmarks.interval_coverage                                  the emoji that come along
    python -m benchmarks.interval_coverage --data pacs.parquet --domain photo
    python -m benchmarks.interval_coverage --data features.parquet --class-embeddings features_text.npy

A fit on few shots states an interval of the probability of the class that it names. Two things are asked of it.

* *more shots*: the probability that a fit on four times the shots gives the same class, is it inside? It is what the
  interval speaks of: where the weights would go if more were known.
* *right*: test pictures in ten groups by their probability; is the share that is right inside the mean interval?

Nothing here is chosen on test pictures. The table goes to stdout as Markdown.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kngd_ray.config import load_config
from kngd_ray.console import Display, with_interval
from kngd_ray.experiment.aggregate import interval
from kngd_ray.experiment.prepared import prepare
from kngd_ray.experiment.run import train
from kngd_ray.experiment.run_folder import fit_of
from kngd_ray.experiment.task import open_task
from kngd_ray.training.classifier import Classification, Classifier

GROUPS = 10


def main() -> None:
    """Fit, judge the test pictures, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded", help="parquet file of the package's schema")
    parser.add_argument("--domain", default=None, help="domain trained on; the others are out of distribution")
    parser.add_argument("--class-embeddings", default=None, help="of --data that holds features")
    parser.add_argument("--shots", default="2", help="some numbers; data must have four times as many")
    parser.add_argument("--seeds", default="0-4")
    options = parser.parse_args()
    print("| shots | tested on | more shots % | right %, of ten groups | mean width |\n|---|---|---|---|---|")
    for shots in map(int, options.shots.split(",")):
        few, labels = judged(options, shots)
        more, _ = judged(options, 4 * shots)
        for name in labels:
            seeds = range(len(few))
            inside = [covered(few[s][name], more[s][name]) for s in seeds]
            right = [groups_right(few[s][name], labels[name]) for s in seeds]
            width = [float((few[s][name].interval[:, 1] - few[s][name].interval[:, 0]).mean()) for s in seeds]
            cells = [with_interval(interval(each, "accuracy"), 100, 0) for each in (inside, right)]
            print(f"| {shots} | {name} | {' | '.join(cells)} | {sum(width) / len(width):.2f} |", flush=True)


def judged(options: argparse.Namespace, shots: int) -> tuple[list[Mapping[str, Any]], Mapping[str, Tensor]]:
    """What fits say of the test pictures, by seed and test set, and the labels."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"seeds={options.seeds}", f"data.path={options.data}", f"data.shots={shots}"]
        settings += [] if options.domain is None else [f"data.train_domain={options.domain}"]
        if options.class_embeddings is not None:
            settings += ["model.name=precomputed", f"model.class_embeddings={options.class_embeddings}"]
        settings += ["trainer.num_workers=0", f"trainer.storage_path={folder}", "trainer.name=run"]
        config = load_config(overrides=[*settings, "tracking.enabled=false"])
        train(config, Display(quiet_stdout=True))
        prepared = prepare(open_task(config))
        found, labels = [], {}
        for seed in config.seeds:
            classifier = Classifier.load(fit_of(Path(folder) / "run", config.method, seed))
            tests = prepared.tests(seed)
            labels = {name: test.labels for name, test in tests.items()}
            found.append({name: classifier.classify(test.features) for name, test in tests.items()})
    return found, labels


def covered(few: Classification, more: Classification) -> float:
    """Share of pictures whose probability by a fit on more shots is inside."""
    assert few.interval is not None
    p = more.probabilities.gather(1, few.probabilities.argmax(1, keepdim=True)).squeeze(1)
    return float(((few.interval[:, 0] <= p) & (p <= few.interval[:, 1])).double().mean())


def groups_right(few: Classification, labels: Tensor) -> float:
    """Share of groups of pictures in which as many are right as the interval says.

    Where all are right, the upper end is met unless it makes that less probable than 5 %.
    """
    assert few.interval is not None
    best = few.probabilities.max(1).values
    right = (few.probabilities.argmax(1) == labels).double()
    inside = []
    for rows in best.argsort().chunk(GROUPS):
        low, high = few.interval[rows].mean(0)
        share = right[rows].mean()
        inside.append(bool(low <= share) and bool(share <= high or (share == 1 and high ** len(rows) > 0.05)))
    return sum(inside) / len(inside)


if __name__ == "__main__":
    main()
