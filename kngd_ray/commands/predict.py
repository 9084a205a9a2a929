"""``kngd-ray predict``: class, probability and uncertainty of picture files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from kngd_ray.commands.display import Display
from kngd_ray.commands.run_folder import find_fit
from kngd_ray.data import decode
from kngd_ray.errors import DataError
from kngd_ray.training.classifier import Classifier
from kngd_ray.training.predict import entropy


def predict(target: str, images: Sequence[str], storage_path: str, display: Display) -> list[dict[str, Any]]:
    """Classify picture files.

    Args:
        target: run, fit or checkpoint.
        images: the files.
        storage_path: where runs live.
        display: where the table is shown.

    Returns:
        Per picture: ``image``, ``class``, ``probability``, ``logit_std`` (of that class), ``entropy``
        (nats) and ``probabilities`` by class.

    Raises:
        DataError: a file is missing or unreadable.
    """
    pictures = []
    for name in images:
        try:
            pictures.append(decode(Path(name).read_bytes(), name))
        except OSError as error:
            raise DataError(f"the picture {name} cannot be read ({error.strerror}): check the path.") from error
    folder = find_fit(target, storage_path)
    classifier = Classifier.load(folder)
    prediction = classifier.predict(pictures)
    entropies = entropy(prediction.probabilities)
    rows: list[dict[str, Any]] = []
    for n, name in enumerate(images):
        p, spread = prediction.probabilities[n], prediction.logit_std[n]
        best = int(p.argmax())
        rows.append({
            "image": name,
            "class": classifier.class_names[best],
            "probability": float(p[best]),
            "logit_std": float(spread[best]),
            "entropy": float(entropies[n]),
            "probabilities": dict(zip(classifier.class_names, p.tolist(), strict=True)),
        })
    table = Table("image", "class", "probability", "logit std", "entropy (nats)")
    for row in rows:
        table.add_row(
            escape(row["image"]),
            escape(row["class"]),
            *(f"{row[key]:.3f}" for key in ("probability", "logit_std", "entropy")),
        )
    display.out.print(table)
    return rows
