"""Measurements, each with the environment that it was taken in."""
