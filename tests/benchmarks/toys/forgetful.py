"""Its loss does not fall."""

from tests.benchmarks.toys import built, product

__all__ = ["PACKAGES", "PRECISION", "build", "product", "variants"]
PACKAGES = ("numpy",)
PRECISION = "float32"


def variants(workload, task):
    return ("only",)


def build(workload, variant):
    return built(workload, [3.0])
