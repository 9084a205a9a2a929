"""
Features of another model
=========================

Any matrix of features will do: here three clusters, without class embeddings.
"""

import numpy as np

from kngd_ray import KalmanCLIP

generator = np.random.default_rng(0)
centres = generator.normal(size=(3, 16))
labels = np.arange(90) % 3
features = centres[labels] + 0.5 * generator.normal(size=(90, 16))

probe = KalmanCLIP(model="precomputed").fit(features[:30], labels[:30])
print(f"accuracy {probe.score(features[30:], labels[30:]):.3f}")
