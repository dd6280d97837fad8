"""For every op, how to call it and what NumPy or a naive loop says that it gives. A family of ops has one file."""

from tests.autodiff.cases import elementwise, products, shapes, transformers, windows  # noqa: F401  # they add their cases
from tests.autodiff.cases.case import CASES, Case

__all__ = ["CASES", "Case"]
