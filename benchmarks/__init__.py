"""Measurements, each with the environment that it was taken in."""

import os

# read when torch is first imported: its profiler, which counts memory, complains where there is no GPU
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
