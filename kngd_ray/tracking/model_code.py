"""The logged model as code: MLflow keeps a copy of this file beside the fit and runs it to load the model.

Nothing is pickled. A table with a column ``image`` of picture files' bytes becomes a table with

- ``class``: name of the most probable class;
- ``probability``: its posterior predictive probability;
- ``uncertainty``: entropy of the posterior predictive distribution, nats;
- ``logit_std``: posterior standard deviation of that class's logit;
- ``probabilities``: of all classes, in the order of ``class_names`` in the model's metadata.
"""

from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

_BATCH = 32  # decoded pictures held at once


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
        """Classify pictures.

        Args:
            context: unused.
            model_input: m rows with a column ``image``, bytes of PNG, JPEG and the like.
            params: unused.

        Returns:
            m rows: class, probability, uncertainty, logit_std, probabilities.
        """
        from kngd_ray.data import decode
        from kngd_ray.training.predict import entropy

        del context, params
        rows: list[dict[str, Any]] = []
        pictures = [bytes(data) for data in model_input["image"]]
        for start in range(0, len(pictures), _BATCH):
            batch = [decode(data, f"row {start + n}") for n, data in enumerate(pictures[start : start + _BATCH])]
            found = self.classifier.predict(batch)
            p = found.probabilities.double()
            uncertainty = entropy(p)
            top = p.argmax(1)
            for n, c in enumerate(top.tolist()):
                rows.append({
                    "class": self.classifier.class_names[c],
                    "probability": float(p[n, c]),
                    "uncertainty": float(uncertainty[n]),
                    "logit_std": float(found.logit_std[n, c]),
                    "probabilities": p[n].tolist(),
                })
        columns = ["class", "probability", "uncertainty", "logit_std", "probabilities"]
        return pd.DataFrame(rows, columns=columns, index=model_input.index)


set_model(ClassifierModel())
