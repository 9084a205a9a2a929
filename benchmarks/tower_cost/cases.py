"""Networks, batches and methods that are measured."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import open_clip
import torch

from kngd_ray.clip import ClipModel, CLIPNetwork, ModelConfig, TuneOptions, load_model
from kngd_ray.filters import CovarianceFamily, Diagonal, Kronecker
from kngd_ray.observations import LogLikelihood
from kngd_ray.sharding import Group, split_evenly
from kngd_ray.training.batches import Batch
from kngd_ray.training.gradient import GradientDescent
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.losses import CrossEntropy
from kngd_ray.training.method import Method
from kngd_ray.training.options import FilterOptions, FitOptions, OptimizerOptions

REFERENCE = "adamw"
FAMILIES: dict[str, CovarianceFamily] = {
    "ekf": Diagonal(rule="ekf"),
    "vdekf": Diagonal(rule="vdekf"),
    "ekf-4": Diagonal(rule="ekf", samples=4),
    "kronecker": Kronecker(tokens="reduced"),
}
_SMALL = "small-vit"
_CLASSES = 20
_STEPS = 10**6  # length of a run, of which only the learning rate's schedule knows


@dataclass(frozen=True)
class Case:
    """A network and a batch.

    Attributes:
        model: ``small-vit``, ``embedded``, or a name of open_clip.
        m: samples of the global batch.
        precision: of the towers' arithmetic.
        device: where it runs.
    """

    model: str
    m: int
    precision: str
    device: str

    def network(self) -> CLIPNetwork:
        """The same network each time, its image tower to be trained."""
        tune = TuneOptions(parameters="full", precision=self.precision)  # type: ignore[arg-type]
        names = [f"class {c}" for c in range(_CLASSES)]
        return CLIPNetwork(_model(self.model), names, ("a photo of a {}.",), tune).to(self.device)

    def batch(self, network: CLIPNetwork, group: Group) -> Batch:
        """This rank's part of the same batch each time."""
        pixels = network.example(self.m)["image"]
        labels = torch.arange(self.m, device=self.device) % _CLASSES
        sizes = split_evenly(self.m, group.world_size)
        images, mine = (part.split(sizes)[group.rank].contiguous() for part in (pixels, labels))
        return Batch(network.inputs(mine, image=images), mine, sizes, group.rank, 0)

    def method(self, name: str, network: CLIPNetwork, group: Group) -> Method:
        """A method of :data:`FAMILIES`, or AdamW."""
        if name == REFERENCE:
            optimizer = OptimizerOptions(lr=1e-6, loss=CrossEntropy())
            options = FitOptions(method="adamw", tune=network.options, optimizer=optimizer)
            return GradientDescent(network, options, _STEPS, group)
        options = FitOptions(
            tune=network.options,
            observation=(LogLikelihood(),),
            # little, so that each step is like the first; less would make numbers too small for fast arithmetic
            filter=FilterOptions(covariance=FAMILIES[name], p0=1e-4, towers=1e-4),
        )
        return KalmanNGD(network, options, group=group, streamed=True)


Make = Callable[[str], Method]


@cache
def _model(name: str) -> ClipModel:
    if name == "embedded":
        return load_model(ModelConfig())
    if name == _SMALL:
        vision = {"image_size": 96, "patch_size": 16, "layers": 6, "width": 256, "head_width": 64}
        text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{_SMALL}.json"
            path.write_text(json.dumps({"embed_dim": 256, "vision_cfg": vision, "text_cfg": text}))
            open_clip.add_model_config(path)
            return load_model(ModelConfig(_SMALL, "random"))
    return load_model(ModelConfig(name, "random"))
