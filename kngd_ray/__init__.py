"""Kalman natural-gradient fine-tuning of CLIP models on Ray."""

__version__ = "0.1.0"
