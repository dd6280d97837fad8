"""Its model lacks a weight."""

from tests.benchmarks.toys import built, product

__all__ = ["PACKAGES", "PRECISION", "build", "product", "variants"]
PACKAGES = ("numpy",)
PRECISION = "float32"


def variants(workload, task):
    return ("only",)


def build(workload, variant):
    return built(workload, (3.0 / (1 + i) for i in range(1000)), workload.parameters() - 1)
