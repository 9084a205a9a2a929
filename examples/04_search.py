"""
Search the prior
================

Eight trials over the default preset's prior, judged on training pictures alone; the winner is fitted and tested once.
In this process; ``ray=True`` runs trials on a cluster.
"""

import kngd_ray

search = kngd_ray.tune(
    "noise_priors",
    shots=4,
    num_samples=8,
    seeds=2,
    quiet=True,
    tracking=False,
    **{"search.seeds": [0]},
)
for name, value in search.best["params"].items():
    print(f"{name:<28}{value:.3g}")

figure = search.plot()
figure.savefig("trials.png")

# %%
# What the winner is worth on test pictures:

print(search.run.frame[["method", "seed", "set", "accuracy", "nll"]].round(3).to_string(index=False))
