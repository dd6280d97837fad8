"""Matrix products, softmax, losses: what is summed along an axis."""

import numpy as np

from disttrain import ops
from tests.autodiff import naive
from tests.autodiff.cases.case import case

MATRICES = {
    "matrices": ((3, 2), (2, 4), (0,)),
    "one": ((1, 1), (1, 1), (0,)),
    "batch": ((2, 3, 2), (2, 4), (0,)),
    "batches": ((2, 3, 2), (2, 2, 1), (0, 1)),
    "broadcast": ((1, 3, 2), (5, 2, 2), (1,)),
    "right": ((3, 2), (4, 2, 2), (1,)),
    "deep": ((2, 1, 3, 2), (4, 2, 1), (0,)),
}
for label, (left, right, batched) in MATRICES.items():
    case("matmul", label, ops.matmul, lambda a, b: np.einsum("...ik,...kj->...ij", a, b), left, right, batched=batched)
case("matmul", "vectors", ops.matmul, lambda a, b: (a * b).sum(), (3,), (3,))
case("matmul", "row", ops.matmul, lambda a, b: np.einsum("k,...kj->...j", a, b), (3,), (2, 3, 4), batched=(1,))
case("matmul", "column", ops.matmul, lambda a, b: np.einsum("...ik,k->...i", a, b), (2, 4, 3), (3,), batched=(0,))


def dense(x, kernel, bias=0, relu=False):
    """Return a dense layer's output, number by number."""
    y = np.empty((*x.shape[:-1], kernel.shape[1]))
    for at in np.ndindex(y.shape):
        value = sum(x[at[:-1]] * kernel[:, at[-1]]) + (bias[at[-1]] if np.ndim(bias) else bias)
        y[at] = max(value, 0) if relu else value
    return y


for label, (left, right, batched) in {"rows": ((3, 2), (2, 4), (0,)), "steps": ((2, 3, 2), (2, 5), (0,))}.items():
    case("dense", label, ops.dense, dense, left, right, right[1:], batched=batched)
    case(
        "dense", f"{label} without bias", lambda x, kernel: ops.dense(x, kernel, None), dense, left, right,
        batched=batched,
    )  # fmt: skip
    case(
        "dense",
        f"{label} relu",
        lambda x, kernel, bias: ops.dense(x, kernel, bias, activation="relu"),
        lambda x, kernel, bias: dense(x, kernel, bias, relu=True),
        left,
        right,
        right[1:],
        batched=batched,
    )

for axis in (-1, 0, 1):
    batched = (0,) if axis else ()
    case(
        "softmax",
        f"axis {axis}",
        lambda x, a=axis: ops.softmax(x, axis=a),
        lambda x, a=axis: naive.softmax(x, a),
        (2, 3, 4),
        batched=batched,
    )
    case(
        "log_softmax",
        f"axis {axis}",
        lambda x, a=axis: ops.log_softmax(x, axis=a),
        lambda x, a=axis: x - np.logaddexp.reduce(x, a, keepdims=True),
        (2, 3, 4),
        batched=batched,
    )
case("softmax", "one class", ops.softmax, np.ones_like, (3, 1), batched=(0,))
case("log_softmax", "one class", ops.log_softmax, np.zeros_like, (3, 1), batched=(0,))

case(
    "softmax_cross_entropy",
    "classes",
    ops.softmax_cross_entropy,
    lambda z, t: -(t * np.log(naive.softmax(z))).sum(-1),
    (3, 4),
    (3, 4),
    batched=(0, 1),
)
LABELS = np.array([[1, 0, 1], [3, 2, 0]])
case(
    "sparse_softmax_cross_entropy",
    "places",
    lambda z: ops.sparse_softmax_cross_entropy(z, LABELS[: z.shape[0]]),
    lambda z: np.array([[-np.log(naive.softmax(z)[i, j, LABELS[i, j]]) for j in range(3)] for i in range(2)]),
    (2, 3, 4),
    batched=(0,),
)
case(
    "sigmoid_cross_entropy",
    "outputs",
    ops.sigmoid_cross_entropy,
    lambda z, t: -(t * np.log(1 / (1 + np.exp(-z))) + (1 - t) * np.log(1 / (1 + np.exp(z)))),
    (3, 2),
    (3, 2),
    values="distinct",
    batched=(0, 1),
)
case(
    "mean_squared_error",
    "outputs",
    ops.mean_squared_error,
    lambda y, t: ((y - t) ** 2).sum(-1) / 5,
    (3, 5),
    (3, 5),
    batched=(0, 1),
)
