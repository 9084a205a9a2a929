"""The methods that are compared: each a module, each a line here.

A method fits all cases of a problem under given settings and predicts their test sets. One that is searched also says
which settings there are.
"""

from benchmarks.few_shot.methods import (
    adamw,
    clap,
    gda,
    ivon,
    kalman,
    laplace,
    linear_probe,
    lp_plus_plus,
    proker,
    sharpened,
    tip_adapter,
    tip_adapter_f,
    zero_shot,
)
from benchmarks.few_shot.methods._base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        zero_shot.METHOD,
        linear_probe.METHOD,
        tip_adapter.METHOD,
        tip_adapter_f.METHOD,
        gda.METHOD,
        proker.METHOD,
        clap.METHOD,
        lp_plus_plus.METHOD,
        adamw.CLIP_ADAPTER,
        adamw.CLASS_RESIDUAL,
        adamw.FIXED,
        adamw.LINEAR_CLASS_RESIDUAL,
        adamw.BEST,
        adamw.SINGLE_PASS,
        sharpened.CLASS_RESIDUAL,
        sharpened.FIXED,
        ivon.METHOD,
        laplace.METHOD,
        kalman.KF_CLIP,
        kalman.LOKO,
        kalman.DIAGONAL,
        kalman.OURS,
        kalman.CHAMPION,
    )
}

__all__ = ["METHODS", "Method"]
