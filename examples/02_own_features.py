"""
Features of another model
=========================

Any matrix of features will do: here three clusters, without class embeddings.
"""

import numpy as np
from matplotlib.figure import Figure

from kngd_ray import KalmanCLIP

generator = np.random.default_rng(0)
centres = generator.normal(size=(3, 16))
labels = np.arange(90) % 3
features = centres[labels] + 0.5 * generator.normal(size=(90, 16))

probe = KalmanCLIP(model="precomputed").fit(features[:30], labels[:30])
print(f"accuracy {probe.score(features[30:], labels[30:]):.3f}")

# %%
# Between two centres the classes change over, and the posterior is least sure of the probability:

share = np.linspace(0, 1, 41)[:, None]
probabilities, std = probe.predict_proba((1 - share) * centres[0] + share * centres[1], return_std=True)
figure = Figure(figsize=(5.0, 2.6), layout="constrained")
axes = figure.subplots()
for label, colour in enumerate(("tab:blue", "tab:orange", "tab:green")):
    mean, spread = probabilities[:, label], std[:, label]
    axes.plot(share, mean, color=colour, label=f"class {label}")
    axes.fill_between(share[:, 0], (mean - spread).clip(0), (mean + spread).clip(max=1), color=colour, alpha=0.2)
axes.set(xlabel="from the centre of class 0 to that of class 1", ylabel="probability ± std")
axes.legend(fontsize=8)
figure.savefig("between_classes.png")
