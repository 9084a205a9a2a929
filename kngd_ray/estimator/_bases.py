"""Scikit-learn's base classes, or stand-ins where it is not installed."""

try:
    from sklearn.base import BaseEstimator as BaseEstimator
    from sklearn.base import ClassifierMixin as ClassifierMixin
except ImportError:  # it is not needed

    class ClassifierMixin:  # type: ignore[no-redef]
        """Stands for scikit-learn's."""

    class BaseEstimator:  # type: ignore[no-redef]
        """Stands for scikit-learn's."""
