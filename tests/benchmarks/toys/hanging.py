"""It never gets ready."""

import threading

from tests.benchmarks.toys import product

__all__ = ["PACKAGES", "PRECISION", "build", "product", "variants"]
PACKAGES = ("numpy",)
PRECISION = "float32"


def variants(workload, task):
    return ("only",)


def build(workload, variant):
    threading.Event().wait()
