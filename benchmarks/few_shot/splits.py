"""The shots of every support set, published, so that others fit the same pictures.

    python -m benchmarks.few_shot.splits --data embedded pacs.parquet     write benchmarks/few_shot/splits/*.json
    python -m benchmarks.few_shot.splits --check --data pacs.parquet      see that what is written is what is drawn

A file has, by domain, seed and class, the first 16 hexadecimal digits of the sha256 of each picture's bytes, in the
order in which they are drawn: k shots are the first k. ``digest`` is that of the whole data set, as MLflow has it. The
tests are the data set's own: the rows of the split ``test``, of the domain trained on and of the others.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.few_shot.data import DataSet

FOLDER = Path(__file__).parent / "splits"
SEEDS, MOST_SHOTS = range(10), 16
_DIGITS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["embedded"], help="parquet files of pictures, or embedded")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file differs")
    options = parser.parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    wrong = 0
    for path in options.data:
        data = DataSet(path)
        file, text = FOLDER / f"{data.name}.json", as_text(splits_of(data))
        if not options.check:
            file.write_text(text)
            continue
        same = file.is_file() and file.read_text() == text
        wrong += not same
        print(f"{file.name}: {'as drawn' if same else 'differs from what is drawn'}")
    return int(wrong > 0)


def splits_of(data: DataSet) -> dict[str, Any]:
    """The support sets of a data set.

    Args:
        data: of pictures.

    Returns:
        JSON data.
    """
    images, most = data.images, data.most_shots
    drawn: dict[str, dict[str, dict[str, list[str]]]] = {}
    for domain in data.domains:
        shots = min(MOST_SHOTS, most[domain])
        drawn[domain] = {}
        for seed in SEEDS:
            rows = data.shots(domain, shots, seed)
            by_class: dict[str, list[str]] = {}
            for row in rows.tolist():
                name = images.class_names[images.labels[row]]
                by_class.setdefault(name, []).append(images.keys[row].decode()[:_DIGITS])
            drawn[domain][str(seed)] = by_class
    return {"data": data.name, "digest": images.digest, "shots": drawn}


def as_text(splits: dict[str, Any]) -> str:
    """JSON with a line for each support set."""
    domains = []
    for domain, seeds in splits["shots"].items():
        lines = ",\n".join(f"{json.dumps(seed)}: {json.dumps(shots)}" for seed, shots in seeds.items())
        domains.append(f"{json.dumps(domain)}: {{\n{lines}\n}}")
    head = f'{{\n"data": {json.dumps(splits["data"])},\n"digest": {json.dumps(splits["digest"])},\n"shots": {{\n'
    return head + ",\n".join(domains) + "\n}\n}\n"


if __name__ == "__main__":
    sys.exit(main())
