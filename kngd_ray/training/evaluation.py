"""In- and out-of-distribution figures of a predictor, with and without temperature scaling."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kngd_ray.errors import FilterError
from kngd_ray.training.batches import Shots
from kngd_ray.training.calibration import AnyPredictor, Calibration, scale
from kngd_ray.training.metrics import Scores

ID = "id"
MEAN = "mean"
_KEPT = re.compile(r"(domain )*(id|ood|mean|ood mean)(/.*)?", re.IGNORECASE)


def set_name(domain: str) -> str:
    """What a domain's test set is called in figures, tables and metrics.

    Args:
        domain: its name in the data.

    Returns:
        The same name; ``domain mean`` and the like where it could be mistaken for the figures in distribution or for a
        mean. Different domains have different names.
    """
    return f"domain {domain}" if _KEPT.fullmatch(domain) else domain


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on every test set.

    Attributes:
        plain: figures of the predictions as they are, by test set: ``id`` and each OOD domain by its ``set_name``.
        scaled: the same after temperature scaling fitted on the training shots.
        probabilities: (m, C) predictions as they are, by test set.
        calibration: tau and the scaling temperature that were used.
    """

    plain: dict[str, Scores]
    scaled: dict[str, Scores]
    probabilities: dict[str, Tensor]
    calibration: Calibration

    def report(self) -> dict[str, Any]:
        """The figures as ``{"id": {...}, "ood": {"mean": {...}, "<domain>": {...}}}``.

        Each set has the figures of the plain predictions, and under ``temperature_scaled`` the figures after scaling.
        Without OOD domains, ``ood`` is empty.
        """
        domains = [name for name in self.plain if name != ID]
        report: dict[str, Any] = {ID: self._of(self.plain[ID], self.scaled[ID]), "ood": {}}
        if domains:
            report["ood"][MEAN] = self._of(
                Scores.mean([self.plain[d] for d in domains]), Scores.mean([self.scaled[d] for d in domains])
            )
            report["ood"] |= {d: self._of(self.plain[d], self.scaled[d]) for d in domains}
        return report

    @staticmethod
    def _of(plain: Scores, scaled: Scores) -> dict[str, Any]:
        return {**plain.as_dict(), "temperature_scaled": scaled.as_dict()}


def evaluate(predictor: AnyPredictor, tests: Mapping[str, Shots], calibration: Calibration) -> Evaluation:
    """Score a predictor.

    Args:
        predictor: the trained head with its belief.
        tests: samples by test set: ``id`` and each OOD domain.
        calibration: tau and sharpening for the predictions and T for the scaling, from the training shots.

    Returns:
        All figures. A FilterError tells of predictions that are no numbers.
    """
    probabilities = {
        name: calibration.predict(predictor, test.to(predictor.device).inputs).probabilities.cpu()
        for name, test in tests.items()
    }
    for name, p in probabilities.items():
        check_numbers(p, predictor, "in distribution" if name == ID else f"of {name}")
    plain = {name: Scores.of(p, tests[name].labels) for name, p in probabilities.items()}
    scaled = {name: Scores.of(scale(p, calibration.scaling), tests[name].labels) for name, p in probabilities.items()}
    return Evaluation(plain, scaled, probabilities, calibration)


def check_numbers(probabilities: Tensor, predictor: AnyPredictor, which: str = "") -> None:
    """Refuse predictions that are no numbers: the first class would be taken for the most probable one.

    Args:
        probabilities: (m, C) of pictures or features.
        predictor: whose they are.
        which: pictures they are of, for the message.

    Raises:
        FilterError: some are NaN or infinite.
    """
    if bad := int((~probabilities.isfinite()).any(1).sum()):
        setting = "optimizer.lr" if predictor.belief is None else "filter.p0 or filter.tower_logit_variance"
        of = f"{bad} of {len(probabilities)} predictions {which}".rstrip()
        raise FilterError(
            f"{of} are NaN: the fit's weights have grown beyond all bounds; fit it again with {setting} lower."
        )
