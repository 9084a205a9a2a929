"""
Compare with AdamW
==================

The filter and AdamW on the same pictures and seeds, then the difference, paired by seed, from what MLflow has kept.
"""

import kngd_ray

run = kngd_ray.train("kalman", shots=4, seeds=3, baselines=["adamw"], quiet=True, log_model=False)
print(run.frame.groupby(["method", "set"])[["accuracy", "nll", "ece"]].mean().round(3))

figure = run.plot()
figure.savefig("accuracy.png")

# %%
# What ``kngd-ray compare`` says of it:

comparison = kngd_ray.compare("kngd_ray", quiet=True)
columns = ["name", "metric", "mean", "difference", "difference_low", "difference_high"]
print(comparison.frame[columns].round(3).to_string(index=False))
