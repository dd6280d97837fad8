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
