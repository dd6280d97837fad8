"""What the bits of a result depend on besides the run itself: it is written beside each checkpoint."""

import functools
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version

import numpy as np

from disttrain.kernels.instruction_sets import choose, cpu_flags
from disttrain.kernels.library import chosen
from disttrain.kernels.precision import get_matmul_precision


def circumstances() -> dict[str, str]:
    """Return the versions of all that computes here, by names to show."""
    kernels, widest = chosen(), choose("", cpu_flags())
    assert widest is not None
    return {
        "disttrain": version("disttrain"),
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "BLAS": _blas(),
        "CPU": f"{platform.machine()} {widest.name}",  # what NumPy's own loops are chosen by, more or less
        "kernels": kernels.path.stem if kernels.path else kernels.name,  # named after sources, compiler and CPU
        "matmul precision": get_matmul_precision(),
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return in words what is not as it was; empty if all is."""
    changed = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} was {before.get(name, 'not written down')} and is {now[name]}" for name in changed)


def one_blas_thread() -> AbstractContextManager[object]:
    """Return a context in which BLAS has one thread: it divides sums, and workers have different numbers of cores."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits


@functools.cache
def _blas() -> str:
    """Return which BLAS NumPy has, and which of its kernels serve on this CPU."""
    from threadpoolctl import threadpool_info

    found = [each for each in threadpool_info() if each["user_api"] == "blas"]
    return (
        ", ".join(f"{b['internal_api']} {b['version']} {b.get('architecture', '')}".strip() for b in found) or "unknown"
    )
