"""The command line: arguments in, exit code out."""

from kngd_ray.cli.app import main

__all__ = ["main"]
