"""It lacks what the workload needs."""

from benchmarks.systems import AbsentError
from tests.benchmarks.toys import product

__all__ = ["PACKAGES", "PRECISION", "build", "product", "variants"]
PACKAGES = ("numpy",)
PRECISION = "float32"


def variants(workload, task):
    return ("only",)


def build(workload, variant):
    raise AbsentError("there is no attention here")
