"""The logged model as code: MLflow keeps a copy of this file beside the fit and runs it to load the model.

Nothing is pickled. A table with a column ``image`` of picture files' bytes, or of a fit on features with a column
``features`` of lists of floats, becomes a table with

- ``class``: name of the most probable class;
- ``probability``: its posterior predictive probability;
- ``probability_low``, ``probability_high``: 90 % credible interval of that probability;
- ``unlike``: share of the training shots, held out, that the fit is surer of: 0.99 is more unlike than 99 % of them;
- ``uncertainty``: entropy of the posterior predictive distribution, nats;
- ``logit_std``: posterior standard deviation of that class's logit;
- ``probabilities``: of all classes, in the order of ``class_names`` in the model's metadata.

What is not known (without a posterior there is no interval, of older fits no ``unlike``) is missing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

_BATCH = 32  # decoded pictures held at once
_FEATURES = 1024  # features classified at once
_COLUMNS = [
    "class",
    "probability",
    "probability_low",
    "probability_high",
    "unlike",
    "uncertainty",
    "logit_std",
    "probabilities",
]


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
            model_input: m rows with a column ``image``, bytes of PNG, JPEG and the like, or ``features``.
            params: unused.

        Returns:
            m rows with the columns above.
        """
        del context, params
        rows: list[dict[str, Any]] = []
        for batch in self._batches(model_input):
            rows += self.classifier.judge(batch).rows(self.classifier.class_names)
        found = pd.DataFrame(rows, columns=_COLUMNS, index=model_input.index)
        # numbers also where all are missing
        return found.astype(dict.fromkeys(["probability_low", "probability_high", "unlike"], "float64"))

    def _batches(self, model_input: pd.DataFrame) -> Iterator[Any]:
        """What the classifier takes, a part at a time."""
        from kngd_ray.data import decode
        from kngd_ray.estimator.given import features_of

        if "image" in model_input:
            pictures = [bytes(data) for data in model_input["image"]]
            for start in range(0, len(pictures), _BATCH):
                yield [
                    decode(data, f"row {start + n}", "replace it")
                    for n, data in enumerate(pictures[start : start + _BATCH])
                ]
            return
        vectors = list(model_input["features"])
        for start in range(0, len(vectors), _FEATURES):
            yield features_of(vectors[start : start + _FEATURES], self.classifier.model.embed_dim, start)


set_model(ClassifierModel())
