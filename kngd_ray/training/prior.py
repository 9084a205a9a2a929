"""The posterior becomes a prior: a fit that starts where an earlier one ended.

The new fit begins at the N(mu, P) of the earlier one, so on linear observations both together learn what one pass over
all their shots would. Shots that both have seen count twice. Only the belief continues: the observation noise was
estimated from the earlier data and an optimiser's moments belong to its loss, so both start anew.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kngd_ray.errors import CheckpointError
from kngd_ray.training import checkpoint
from kngd_ray.training.method import MethodState


@dataclass(frozen=True)
class Prior:
    """A verified checkpoint from which a fit starts. Its tensors stay on storage until a rank needs them.

    Attributes:
        folder: the checkpoint, readable on every rank.
        manifest: what it held when it was chosen.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def taken(self) -> int:
        """Steps of one and the same stream that led to it; 0 where the next fit is a task of its own."""
        return 0

    @property
    def sha256(self) -> str:
        """Of all that it holds, by the checksums in its manifest."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()

    def load(self) -> MethodState:
        """Read it again where it is needed.

        Returns:
            The state that the earlier fit ended with, its covariance whole.

        Raises:
            CheckpointError: it is not what it was when it was chosen.
        """
        found = checkpoint.load(self.folder)
        if found.manifest != self.manifest:
            raise CheckpointError(f"the prior {self.folder} was replaced while it was in use: start the run again.")
        return found.state
