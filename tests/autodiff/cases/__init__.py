"""For every op, how to call it and what NumPy or a naive loop says that it gives. A family of ops has one file."""

from tests.autodiff.cases import (  # noqa: F401  # they add their cases
    elementwise,
    products,
    recurrent,
    shapes,
    transformers,
    windows,
)
from tests.autodiff.cases.case import CASES, Case

__all__ = ["CASES", "Case"]
