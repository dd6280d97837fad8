"""Reductions, and ops that move elements."""

import numpy as np

from disttrain import ops
from tests.autodiff.cases.case import case

AXES = {"all": None, "first": 0, "last": -1, "two": (0, -1), "negative": (-2,), "numpy": np.int64(1)}
REDUCTIONS = {"sum": np.add.reduce, "max": np.maximum.reduce}
for label, axis in AXES.items():
    for keepdims in (False, True):
        options = {"axis": axis, "keepdims": keepdims}
        name = f"{label}{' kept' if keepdims else ''}"
        case(
            "sum",
            name,
            lambda x, o=options: ops.sum(x, **o),
            lambda x, o=options: np.add.reduce(x, **o),
            (2, 3, 4),
            batched=(0,),
        )
        kept_batch = (0,) if label in ("last", "negative") else ()  # the mean and maximum of nothing are none
        case(
            "mean",
            name,
            lambda x, o=options: ops.mean(x, **o),
            lambda x, o=options: np.add.reduce(x, **o) * (np.add.reduce(x, **o).size / x.size),
            (2, 3, 4),
            batched=kept_batch,
        )
        case(
            "max",
            name,
            lambda x, o=options: ops.max(x, **o),
            lambda x, o=options: np.maximum.reduce(x, **o),
            (2, 3, 4),
            values="distinct",
            batched=kept_batch,
        )
for name in ("sum", "mean", "max"):
    case(name, "of one", getattr(ops, name), lambda x: x[0, 0], (1, 1))

case(
    "reshape",
    "flat",
    lambda x: ops.reshape(x, shape=(x.shape[0], 12)),
    lambda x: np.array([a.ravel() for a in x]),
    (2, 3, 4),
)
case(
    "reshape",
    "inferred",
    lambda x: ops.reshape(x, shape=(-1, 2)),
    lambda x: np.array([*zip(x.flat[::2], x.flat[1::2], strict=True)]),
    (3, 4),
)
case(
    "reshape",
    "batch",
    lambda x: ops.reshape(x, shape=(x.shape[0], 4)),
    lambda x: x.reshape(-1, 4),
    (3, 2, 2),
    batched=(0,),
)
for axis in (0, 1, -1):
    case("flip", f"axis {axis}", lambda x, a=axis: ops.flip(x, axis=a), lambda x, a=axis: np.flip(x, a), (2, 3, 4))
case("flip", "batch", lambda x: ops.flip(x, axis=1), lambda x: np.fliplr(x), (3, 1, 2), batched=(0,))
case("transpose", "reversed", ops.transpose, lambda x: np.einsum("ijk->kji", x), (2, 3, 1), batched=(0,))
case("transpose", "cycle", lambda x: ops.transpose(x, axes=(1, 2, 0)), lambda x: np.einsum("ijk->jki", x), (2, 3, 4))
case(
    "transpose",
    "negative",
    lambda x: ops.transpose(x, axes=(-1, 0, -2)),
    lambda x: np.einsum("ijk->kij", x),
    (2, 3, 4),
    batched=(0,),
)
for label, shape, to in (
    ("row", (4,), (3, 4)),
    ("column", (3, 1), (3, 2)),
    ("scalar", (), (2, 1)),
    ("both", (2, 1, 3), (4, 2, 5, 3)),
):
    case(
        "broadcast_to", label, lambda x, to=to: ops.broadcast_to(x, shape=to), lambda x, to=to: np.zeros(to) + x, shape
    )
    case("sum_to", label, lambda x, shape=shape: ops.sum_to(x, shape=shape), lambda x, s=shape: _sum_to(x, s), to)
case(
    "broadcast_to",
    "empty",
    lambda x: ops.broadcast_to(x, shape=(x.shape[0], 3)),
    lambda x: np.hstack([x, x, x]),
    (2, 1),
    batched=(0,),
)
case("sum_to", "samples", lambda x: ops.sum_to(x, shape=(1, 3)), lambda x: _sum_to(x, (1, 3)), (2, 3), batched=(0,))


def _sum_to(x, shape):
    y = np.zeros(shape)
    padded = (1,) * (x.ndim - len(shape)) + shape
    for at in np.ndindex(x.shape):
        y.reshape(padded)[tuple(0 if n == 1 else i for i, n in zip(at, padded, strict=True))] += x[at]
    return y


for axis in (0, 1, -1):
    case(
        "concatenate",
        f"axis {axis}",
        lambda *xs, a=axis: ops.concatenate(xs, axis=a),
        lambda *xs, a=axis: np.concatenate(xs, a),
        *[(2, 3)] * 3,
        batched=(0, 1, 2),
    )
for axis in (0, 1, -1, -2):
    case(
        "stack",
        f"axis {axis}",
        lambda *xs, a=axis: ops.stack(xs, axis=a),
        lambda *xs, a=axis: np.stack(xs, a),
        (2, 3),
        (2, 3),
        batched=(0, 1),
    )
case(
    "concatenate",
    "lengths",
    lambda a, b: ops.concatenate([a, b], axis=1),
    lambda a, b: np.hstack([a, b]),
    (2, 1),
    (2, 5),
)

INDEX = {
    "number": 1,
    "negative": -1,
    "slice": slice(0, 3, 2),
    "backwards": slice(None, None, -1),
    "mixed": (slice(None), None, 2),
    "ellipsis": (..., slice(1, 3)),
    "repeated": np.array([0, 2, 0, 0]),
    "list": [1, 1],
    "pairs": (np.array([0, 2, 0]), np.array([1, 3, 1])),
    "mask": np.array([True, False, True]),
}
for label, index in INDEX.items():
    case("getitem", label, lambda x, i=index: ops.getitem(x, index=i), lambda x, i=index: x[i], (3, 4))
case(
    "getitem",
    "empty",
    lambda x: ops.getitem(x, index=(slice(None), [0, 0])),
    lambda x: x[:, [0, 0]],
    (3, 2),
    batched=(0,),
)

PICKED = np.array([[1, 0, 3], [2, 2, 1]])
for label, shape in {"vectors": (2, 3, 4), "long": (2, 3, 17)}.items():
    case(
        "pick",
        label,
        lambda x: ops.pick(x, PICKED[: x.shape[0]]),
        lambda x: np.array([[x[i, j, PICKED[i, j]] for j in range(3)] for i in range(2)]),
        shape,
        batched=(0,),
    )
case("pick", "one", lambda x: ops.pick(x, np.array(1)), lambda x: x[1], (3,))
