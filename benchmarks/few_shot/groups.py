"""Groups of problems, each kept, judged and shown by itself.

    mini             pictures by the shipped mini CLIP                        folder of the results
    crops            the same, with random crops of each shot                 crops/
    clip_geometry    the same problems in the geometry of CLIP's embeddings   clip_geometry/
    real             features that were computed elsewhere, by their path     real/
    many             made data of many classes: many, many200                 many/

Here is also which methods a group is run with when none are named. The search's champion is run where it is
named. IVON, Laplace, AdamW's other adapters and the older
Kalman presets are run in ``mini`` alone, for the time they take or the accuracy they lack: name them to have them
elsewhere. Of many classes there are only methods that need no search, or one of seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.few_shot.data import (
    CLIP_GEOMETRY,
    CROPS,
    MANY,
    MINI,
    REAL,
    Data,
    DataSet,
    FeatureSet,
    Geometry,
    has_features,
    read_features,
)
from benchmarks.few_shot.geometry import SCALE
from benchmarks.few_shot.made import MADE, made
from benchmarks.few_shot.methods import METHODS
from benchmarks.few_shot.store import Store

_NOT_IN_MINI = ("adamw_class_residual_fixed", "adamw_fixed_sharpened", "champion")
_RIVALS = (
    "zero_shot",
    "linear_probe",
    "tip_adapter",
    "tip_adapter_f",
    "gda",
    "proker",
    "clap",
    "lp++",
    "adamw_class_residual",
    "adamw_sharpened",
    "ours",
)
# the others have no word on crops, in their papers or here
_WITH_CROPS = tuple(name for name in _RIVALS if name not in {"clap", "lp++"})
LEARN_FROM_CROPS = (*_WITH_CROPS, "champion")


@dataclass(frozen=True)
class Group:
    """Problems that belong together.

    Attributes:
        name: on the command line, and of the folder.
        title: in the report.
        methods: run when none are named.
        shots: per class, when none are named.
        seeds: number of support sets, when none is named.
        adamw: the rival that claims about AdamW are made against.
    """

    name: str
    title: str
    methods: Sequence[str]
    shots: Sequence[int] = (1, 2, 4, 8, 16)
    seeds: int = 10
    adamw: str = "adamw_class_residual"


GROUPS: Mapping[str, Group] = {
    group.name: group
    for group in (
        Group(MINI, "mini CLIP", [name for name in METHODS if name not in _NOT_IN_MINI]),
        Group(CROPS, "mini CLIP, crops of each shot", _WITH_CROPS),
        Group(CLIP_GEOMETRY, "mini CLIP in CLIP's geometry", _RIVALS),
        Group(REAL, "real CLIP features", _RIVALS),
        Group(
            MANY,
            "many classes, made",
            ("zero_shot", "tip_adapter", "gda", "adamw_class_residual_fixed", "adamw_fixed_sharpened", "ours"),
            (1, 2),
            3,
            "adamw_class_residual_fixed",
        ),
    )
}


def open_data(
    path: str,
    *,
    dev: bool = False,
    geometry: Geometry = "mini",
    views: int = 0,
    class_embeddings: Path | None = None,
    logit_scale: float = SCALE,
) -> Data:
    """The data set that a name or a path means.

    Args:
        path: ``embedded``, ``many``, ``many200``, a parquet file of pictures or one of features.
        dev: whether training rows stand for the test sets.
        geometry: of pictures' features.
        views: random crops of each shot of pictures.
        class_embeddings: text embeddings of a file of features; None is NAME_text.npy beside it.
        logit_scale: of a file of features.

    Returns:
        The data set, which knows its group.
    """
    if path in MADE:
        return FeatureSet(path, made(MADE[path]), group=MANY, dev=dev)
    if has_features(path):
        rows = read_features(Path(path), class_embeddings)
        return FeatureSet(Path(path).stem, rows, logit_scale=logit_scale, dev=dev)
    return DataSet(path, dev=dev, geometry=geometry, views=views)


def store_of(group: str, folder: Path, *, dev: bool = False) -> Store:
    """Where a group's rows are.

    Args:
        group: its name.
        folder: of all results.
        dev: whether the rows are of training pictures.

    Returns:
        The store.
    """
    own = folder if group == MINI else folder / group
    return Store(own / "dev", own / "searches") if dev else Store(own)
