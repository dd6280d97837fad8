"""Elementwise ops: shapes that broadcast, of one element, odd and even."""

import numpy as np

from disttrain import ops
from disttrain.autodiff.op import array_of
from disttrain.backend import get_array_module
from tests.autodiff.cases.case import case

# the first axis is the samples'
ONE = {"sizes": (3, 4), "cube": (2, 1, 5), "one": (1, 1)}
# both first axes are the samples' where `batched` says so
PAIRS = {
    "same": ((3, 4), (3, 4), (0, 1)),
    "row": ((3, 4), (4,), (0,)),
    "column": ((3, 4), (3, 1), (0, 1)),
    "scalar": ((3,), (), (0,)),
    "outer": ((3, 1), (1, 5), (0,)),
    "ones": ((1,), (2, 1, 3), (1,)),
}

UNARY = {
    "abs": (np.abs, "distinct"),
    "exp": (np.exp, "normal"),
    "log": (np.log, "positive"),
    "log1p": (np.log1p, "positive"),
    "negative": (lambda x: 0 - x, "normal"),
    "relu": (lambda x: np.where(x > 0, x, 0), "distinct"),
    "sigmoid": (lambda x: (1 + np.tanh(x / 2)) / 2, "normal"),
    "sqrt": (lambda x: x**0.5, "positive"),
    "tanh": (lambda x: 1 - 2 / (np.exp(2 * x) + 1), "normal"),
}
for name, (oracle, values) in UNARY.items():
    for label, shape in ONE.items():
        case(name, label, getattr(ops, name), oracle, shape, values=values, batched=(0,))

BINARY = {
    "add": (np.add, "normal"),
    "subtract": (np.subtract, "normal"),
    "multiply": (np.multiply, "normal"),
    "divide": (np.divide, "positive"),
    "power": (lambda x, exponent: np.exp(exponent * np.log(x)), "positive"),
    "maximum": (lambda a, b: np.where(a > b, a, b), "normal"),
    "minimum": (lambda a, b: np.where(a < b, a, b), "normal"),
}
for name, (oracle, values) in BINARY.items():
    for label, (*shapes, batched) in PAIRS.items():
        case(name, label, getattr(ops, name), oracle, *shapes, values=values, batched=batched)
for exponent in (0, 1, 2, -1, 0.5):
    case(
        "power",
        f"to the {exponent}",
        lambda x, e=exponent: ops.power(x, e),
        lambda x, e=exponent: x**e,
        (3,),
        values="positive",
        batched=(0,),
    )

case(
    "clip",
    "both sides",
    lambda x: ops.clip(x, low=-1.01, high=0.52),
    lambda x: np.where(x < -1.01, -1.01, np.where(x > 0.52, 0.52, x)),
    (3, 4),
    values="distinct",
    batched=(0,),
)
case("cast", "float64", lambda x: ops.cast(x, dtype=x.dtype), lambda x: x, (3, 1), batched=(0,))


def _even(x):
    return get_array_module(array_of(x)).arange(x.shape[-1]) % 2 == 0


case(
    "where",
    "two",
    lambda a, b: ops.where(_even(a), a, b),
    lambda a, b: np.stack([(a, b)[i % 2][:, i] for i in range(a.shape[1])], axis=1),
    (3, 5),
    (3, 5),
    batched=(0, 1),
)
case(
    "where",
    "broadcast",
    lambda a, b: ops.where(_even(a), a, b),
    lambda a, b: np.where([True, False, True], a, b),
    (3, 3),
    (),
    batched=(0,),
)
