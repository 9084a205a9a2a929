"""Shared by all tests; its place also puts ``tests/`` on the import path, so that they can import :mod:`helpers`."""

import torch

# The tensors here are tiny: more threads would only contend, and sums could depend on the machine's cores.
torch.set_num_threads(1)
