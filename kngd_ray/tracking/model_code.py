"""The logged model as code: MLflow keeps a copy of this file beside the fit and runs it to load the model.

Nothing is pickled. A table with a column ``image`` of picture files' bytes (in JSON base64 of them, as text or as
``{"b64": ...}``; a column ``b64`` of such text stands for it), or of a fit on features with a column ``features`` of
lists of floats, becomes a table with

- ``class``: name of the most probable class;
- ``probability``: its posterior predictive probability;
- ``probability_low``, ``probability_high``: its 90 % interval: where four times the shots would take it;
- ``novelty``: its percentile, 0 to 1: the share of the held-out training shots that the fit is surer of;
- ``uncertainty``: entropy of the posterior predictive distribution, nats;
- ``logit_std``: posterior standard deviation of that class's logit;
- ``probabilities``: of all classes, in the order of ``class_names`` in the model's metadata;
- ``error``: why a row could not be read, of which nothing else is said then. Where none could, that is an error.

What is not known (without a posterior there is no interval, of older fits no ``novelty``) is missing.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from kngd_ray.errors import DataError

_BATCH = 32  # decoded pictures held at once
_FEATURES = 1024  # features classified at once
_COLUMNS = [
    "class",
    "probability",
    "probability_low",
    "probability_high",
    "novelty",
    "uncertainty",
    "logit_std",
    "probabilities",
    "error",
]


_NUMBERS = ["probability", "probability_low", "probability_high", "novelty", "uncertainty", "logit_std"]
_NOTHING: dict[str, Any] = dict.fromkeys(_COLUMNS)


class RefusedRowsError(MlflowException, DataError):  # type: ignore[misc] # mlflow is untyped
    """Nothing that was sent can be classified; a server answers that the request is bad, without a traceback."""


class ClassifierModel(PythonModel):  # type: ignore[misc] # mlflow is untyped
    """A fit as an MLflow model."""

    def load_context(self, context: Any) -> None:
        """Load the fit.

        Args:
            context: MLflow's; its ``model_config`` may name another place of the CLIP model.
        """
        from kngd_ray.training.classifier import Classifier

        fit = Path(context.artifacts["fit"])
        moved = {key: value for key, value in (context.model_config or {}).items() if value}
        if not moved:
            self.classifier = Classifier.load(fit)
            return
        from kngd_ray.clip import ModelConfig

        self.classifier = Classifier.load(fit, ModelConfig(**moved))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Classify pictures or features.

        Args:
            context: unused.
            model_input: m rows with a column ``image`` (or ``b64``), or ``features``.
            params: unused.

        Returns:
            m rows with the columns above.

        Raises:
            RefusedRowsError: no row can be read.
        """
        del context, params
        kind, cells = _cells(model_input)
        at_once = _BATCH if kind == "image" else _FEATURES
        rows: list[dict[str, Any]] = []
        for start in range(0, len(cells), at_once):
            rows += self._judged([
                self._read(kind, cell, start + n) for n, cell in enumerate(cells[start : start + at_once])
            ])
        errors = [row["error"] for row in rows if row["error"] is not None]
        if errors and len(errors) == len(rows):
            more = f" (and so are the other {len(errors) - 1} rows)" if len(errors) > 1 else ""
            raise RefusedRowsError(f"{errors[0]}{more}", INVALID_PARAMETER_VALUE)
        index = model_input.index if len(rows) == len(model_input) else None
        found = pd.DataFrame(rows, columns=_COLUMNS, index=index)
        texts = {name: [row[name] for row in rows] for name in ("class", "probabilities", "error")}  # None stays None
        found = found.assign(**{name: pd.Series(values, found.index, dtype=object) for name, values in texts.items()})
        if os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true":  # NaN is no JSON
            numbers = {name: pd.Series([row[name] for row in rows], found.index, dtype=object) for name in _NUMBERS}
            return found.assign(**numbers)
        # numbers also where all are missing
        return found.astype(dict.fromkeys(_NUMBERS, "float64"))

    def _read(self, kind: str, cell: Any, row: int) -> Any:
        """A picture, or features (1, d); the error where there is none."""
        from kngd_ray.estimator.cells import picture_in
        from kngd_ray.estimator.given import features_of

        try:
            if kind == "image":
                return picture_in(cell, f"row {row}")
            return features_of([cell], self.classifier.model.embed_dim, row)
        except DataError as error:
            return error

    def _judged(self, read: list[Any]) -> list[dict[str, Any]]:
        """What is said of rows; of those with an error this alone."""
        import torch

        usable = [found for found in read if not isinstance(found, Exception)]
        said: Iterator[dict[str, Any]] = iter(())
        if usable:
            inputs = torch.cat(usable) if isinstance(usable[0], torch.Tensor) else usable
            said = iter(self.classifier.classify(inputs).rows(self.classifier.class_names))
        return [
            {**_NOTHING, "error": str(found)} if isinstance(found, Exception) else {**next(said), "error": None}
            for found in read
        ]


def _cells(table: pd.DataFrame) -> tuple[str, list[Any]]:
    """What is to be classified, and of which kind it is.

    Raises:
        RefusedRowsError: there is no column of any.
    """
    if "features" in table:
        return "features", list(table["features"])
    if "image" in table or "b64" in table:
        from kngd_ray.estimator.given import is_missing

        pictures = list(table["image"]) if "image" in table else [None] * len(table)
        encoded = list(table["b64"]) if "b64" in table else [None] * len(table)
        given = [a if is_missing(b) else b for a, b in zip(pictures, encoded, strict=True)]
        return "image", [picture for cell in given for picture in _several(cell)]
    has = ", ".join(map(str, list(table.columns)[:5])) or "none"
    raise RefusedRowsError(
        f'the table has no column image of pictures, nor features (its columns: {has}): send {{"inputs": {{"image": '
        '["base64 of a file"]}} or {"instances": [{"b64": "base64 of a file"}]}',
        INVALID_PARAMETER_VALUE,
    )


def _several(cell: Any) -> list[Any]:
    """The pictures in a cell: MLflow's server makes one row of a list of texts."""
    many = isinstance(cell, list) and all(isinstance(item, (str, bytes, dict)) for item in cell)
    return cell if many else [cell]


set_model(ClassifierModel())
