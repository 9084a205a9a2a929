"""Writing a fit as an MLflow model that predicts from picture bytes, or from features."""

import base64
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_NEEDED = ("kngd_ray", "torch", "torchvision", "open_clip_torch", "safetensors", "numpy", "pandas", "pillow", "mlflow")
# 8 x 8 grey pixels, so that the model's page shows what a request looks like
_EXAMPLE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR4nGNsYIAAJgaKGAAmCACQXTClHgAAAABJRU5ErkJggg=="
)


def save_pyfunc(
    fit: Path,
    path: Path,
    class_names: Sequence[str],
    *,
    run_id: str | None = None,
    model_id: str | None = None,
    features: int | None = None,
) -> None:
    """Write a model folder, see :mod:`~kngd_ray.tracking.model_code` for what it predicts.

    Args:
        fit: folder of the fit, copied into the model.
        path: where to write; must not exist.
        class_names: order of the probabilities, kept in the model's metadata.
        run_id: the MLflow run it comes from.
        model_id: id of the logged model it becomes.
        features: length of the features that the fit takes; None is of one that takes pictures.
    """
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Schema

    example: dict[str, list[Any]]
    if features is None:
        # any type: of binary, MLflow's server makes something of all that is sent, or fails, before the model sees it
        columns = [ColSpec(AnyType(), name, required=False) for name in ("image", "b64")]
        example = {"image": [base64.b64encode(_EXAMPLE).decode()]}
    else:
        columns = [ColSpec(Array(DataType.double), "features")]
        example = {"features": [[1.0] + [0.0] * (features - 1)]}
    signature = ModelSignature(
        inputs=Schema(columns),
        outputs=Schema([
            ColSpec(DataType.string, "class"),
            ColSpec(DataType.double, "probability"),
            ColSpec(DataType.double, "probability_low", required=False),
            ColSpec(DataType.double, "probability_high", required=False),
            ColSpec(DataType.double, "novelty", required=False),
            ColSpec(DataType.double, "uncertainty"),
            ColSpec(DataType.double, "logit_std"),
            ColSpec(Array(DataType.double), "probabilities"),
            ColSpec(DataType.string, "error", required=False),
        ]),
    )
    save_model(
        path=str(path),
        python_model=str(Path(__file__).with_name("model_code.py")),
        artifacts={"fit": fit.absolute().as_uri()},  # MLflow decodes paths: of a%20b it would look for "a b"
        signature=signature,
        input_example=pd.DataFrame(example),
        model_config={"name": "", "pretrained": ""},  # empty: the CLIP model that the fit was trained with
        pip_requirements=requirements(),
        metadata={"class_names": list(class_names)},
        mlflow_model=Model(artifact_path="model", run_id=run_id, model_id=model_id),
    )


def requirements() -> list[str]:
    """The packages that a loaded model needs, pinned to what is installed here.

    Returns:
        Requirement lines; local build labels such as ``+cpu`` are left out, since no index has them.
    """
    found = []
    for name in _NEEDED:
        try:
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:  # a source tree on the path
            found.append(name)
    return found
