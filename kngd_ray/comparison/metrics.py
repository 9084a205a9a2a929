"""The metrics of a comparison: names, directions and formats."""

from dataclasses import dataclass

METRICS = ("id/accuracy", "ood/mean/accuracy", "id/nll", "ood/mean/nll", "id/ece")
FRONT = ("id/accuracy", "ood/mean/accuracy", "id/nll")
STREAM_LABELS = {
    "stream/accuracy": "prequential accuracy %",
    "stream/nll": "prequential NLL",
    "stream/final": "tests at the end %",
    "stream/forgetting": "forgotten %",
}
STREAM_METRICS = tuple(STREAM_LABELS)
STREAM_FRONT = STREAM_METRICS[:3]
OBJECTIVE = "objective/"
TEMPERATURE_SCALED = "/temperature_scaled"  # ends the figures of a test set after scaling: it is no other set
_SHORT = {"nll": "NLL", "ece": "ECE", "aurc": "AURC", "auroc": "AUROC", "brier": "Brier"}


@dataclass(frozen=True)
class Metric:
    """How a metric is called and written.

    Attributes:
        name: in MLflow.
        direction: 1 where more is better, -1 where less is, 0 where it is not known.
    """

    name: str
    direction: int

    @property
    def label(self) -> str:
        """What a person calls it: ``ID accuracy %``, ``OOD NLL``, ``sketch ECE``; other names stay as they are."""
        if self.name in STREAM_LABELS:
            return STREAM_LABELS[self.name]
        if not self.name.startswith(("id/", "ood/", OBJECTIVE)):
            return self.name
        *path, figure = self.name.removeprefix(OBJECTIVE).split("/")
        figure = " ".join(_SHORT.get(word, word) for word in figure.split("_"))
        place = {"id": "ID", "ood/mean": "OOD"}.get("/".join(path), "/".join(path).removeprefix("ood/"))
        said = f"{place} {figure}".strip()
        return f"{said} %" if self.factor == 100 else said

    @property
    def better(self) -> str:
        """The better direction in words; empty if unknown."""
        return {1: "higher is better", -1: "lower is better"}.get(self.direction, "")

    @property
    def factor(self) -> float:
        """Factor from the logged value to the value shown."""
        return 100.0 if self.name.endswith("accuracy") or STREAM_LABELS.get(self.name, "").endswith("%") else 1.0

    def show(self, value: float, sign: str = "") -> str:
        """A figure in the digits that matter.

        Args:
            value: as logged.
            sign: ``+`` for a difference.

        Returns:
            Text.
        """
        scaled = value * self.factor
        digits = 1 if self.factor == 100 else 3 if abs(scaled) < 1000 else 0
        text = f"{scaled:{sign}.{digits}f}"
        return text.replace("-", "−") if float(text) else text.lstrip("+-")  # no -0.0

    def spread(self, low: float, mean: float, high: float) -> str:
        """An interval around a mean: ``±2.4``, or both ends where it is cut at a bound and so not symmetric."""
        if abs((high - mean) - (mean - low)) * self.factor < (0.05 if self.factor == 100 else 0.0005):
            return f"±{self.show((high - low) / 2)}"
        return f" [{self.show(low)}, {self.show(high)}]"
