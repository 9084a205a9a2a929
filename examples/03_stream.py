"""
Learn from a stream
===================

Each batch is predicted before it is learned from; the posterior of one call is the prior of the next.
"""

import numpy as np
from matplotlib.figure import Figure

from kngd_ray import KalmanCLIP

generator = np.random.default_rng(0)
centres = generator.normal(size=(4, 16))
classifier, right = KalmanCLIP(model="precomputed"), []
for number in range(6):
    labels = np.arange(16) % 4
    features = centres[labels] + 2.0 * generator.normal(size=(16, 16))
    if number:
        right.append(float(np.mean(classifier.predict(features) == labels)))
    classifier.partial_fit(features, labels, classes=np.arange(4))
print("accuracy before learning:", *(f"{share:.2f}" for share in right))

# %%
# The same as a figure:

figure = Figure(figsize=(5.0, 2.4), layout="constrained")
axes = figure.subplots()
axes.plot(range(1, 6), right, marker="o")
axes.set(xlabel="batches learned from", ylabel="accuracy on the next one", xticks=range(1, 6))
figure.savefig("stream.png")
