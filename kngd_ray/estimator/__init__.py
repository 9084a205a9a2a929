"""CLIP fine-tuned by the Kalman filter as a classifier with scikit-learn's conventions.

::

    from kngd_ray import KalmanCLIP

    clf = KalmanCLIP().fit(images, labels)
    probabilities, std = clf.predict_proba(others, return_std=True)

    clf = KalmanCLIP(model="precomputed", class_embeddings=texts).fit(features, labels)

Everything happens in this process: no Ray, no MLflow, and nothing is written until :meth:`KalmanCLIP.save`.
"""

from kngd_ray.estimator._conventions import NotFittedError
from kngd_ray.estimator._fitted import FittedClassifier
from kngd_ray.estimator._kalman_clip import KalmanCLIP

__all__ = ["FittedClassifier", "KalmanCLIP", "NotFittedError"]
