"""A case: one way to call one op, and its oracle."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to call one op.

    Attributes:
        op: its name in `ops`.
        label: what is special about this call.
        call: takes the arrays or Tensors `args`, calls the op.
        oracle: takes the arrays `args`, gives the expected value.
        args: float64, away from kinks by much more than the step of finite differences.
        batched: which of `args` have samples along their first axis; none: the case has no empty batch.
    """

    op: str
    label: str
    call: Callable[..., Any]
    oracle: Callable[..., Any]
    args: tuple[Any, ...]
    batched: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


CASES: list[Case] = []


def case(op, label, call, oracle, *shapes, values="normal", batched=()):
    """Add a case with arguments of `shapes`, drawn from a generator of its own."""
    generator = np.random.default_rng(zlib.crc32(f"{op}-{label}".encode()))
    kinds = [values] * len(shapes) if isinstance(values, str) else values
    args = tuple(VALUES[kind](generator, shape) for kind, shape in zip(kinds, shapes, strict=True))
    CASES.append(Case(op=op, label=label, call=call, oracle=oracle, args=args, batched=batched))


def _distinct(generator, shape):
    """Return values from -2 to 2, none nearer than 2 / size to another or to 0: no kink, no tie."""
    size = int(np.prod(shape))
    numbers = np.arange(1, size + 1) * np.where(np.arange(size) % 2, 2, -2) / size
    return generator.permutation(numbers).reshape(shape)


VALUES = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "positive": lambda generator, shape: generator.uniform(0.5, 2, shape),
    "distinct": _distinct,
}
