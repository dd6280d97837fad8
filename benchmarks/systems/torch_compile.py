"""PyTorch with `torch.compile` around model and loss; the fused optimizer, and for images channels last as well."""

from collections.abc import Sequence

from benchmarks.systems.torch import PACKAGES, PRECISION, build, product
from benchmarks.workloads import Workload

__all__ = ["PACKAGES", "PRECISION", "build", "product", "variants"]


def variants(workload: Workload, task: str) -> Sequence[str]:
    """Return "compiled, fused", and for images that with channels_last."""
    compiled = "compiled" if task == "predict" else "compiled, fused"
    return (compiled, f"{compiled}, channels_last") if len(workload.input_shape) == 4 else (compiled,)
