"""It ends in a place where Python cannot tell of it."""

import os
import signal

from tests.benchmarks.toys import product

__all__ = ["PACKAGES", "PRECISION", "build", "product", "variants"]
PACKAGES = ("numpy",)
PRECISION = "float32"


def variants(workload, task):
    return ("only",)


def build(workload, variant):
    os.kill(os.getpid(), signal.SIGSEGV)
