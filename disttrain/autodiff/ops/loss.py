"""Losses per sample, as composites of ops: their gradients follow from their definitions."""

from disttrain.autodiff.composite import composite
from disttrain.autodiff.joining import each
from disttrain.autodiff.ops.elementwise import abs, exp, log1p, relu
from disttrain.autodiff.ops.reduction import mean, sum
from disttrain.autodiff.ops.shape import pick
from disttrain.autodiff.ops.softmax import log_softmax
from disttrain.backend import Array
from disttrain.kernels import softmax as kernels


@composite
def softmax_cross_entropy(logits: Array, targets: Array) -> Array:
    """Return ``-sum(targets * log(softmax(logits)))`` over the last axis.

    Shapes: ``(..., classes), (..., classes) -> (...)``.
    """
    return -sum(targets * log_softmax(logits), axis=-1)


softmax_cross_entropy.kernel(kernels.softmax_cross_entropy)
softmax_cross_entropy.gradient(0).kernel(kernels.softmax_cross_entropy_gradient)


@composite
def sparse_softmax_cross_entropy(logits: Array, labels: Array) -> Array:
    """Return ``-log(softmax(logits))`` at the integer `labels`.

    Shapes: ``(..., classes), (...) -> (...)``.
    """
    return -pick(log_softmax(logits), labels)


sparse_softmax_cross_entropy.kernel(kernels.sparse_softmax_cross_entropy)
sparse_softmax_cross_entropy.gradient(0).kernel(kernels.sparse_softmax_cross_entropy_gradient)


for _op in (softmax_cross_entropy, sparse_softmax_cross_entropy):
    _op.joined = each(0, 1, inner=1)
    _op.gradient(0).joined = each(2, 0, 1, 3, inner=1)


def sigmoid_cross_entropy(logits: Array, targets: Array) -> Array:
    """Return ``-(t * log(s) + (1 - t) * log(1 - s))`` for ``s = sigmoid(logits)``, elementwise.

    Written as ``max(z, 0) - z * t + log(1 + exp(-|z|))``, which neither overflows nor loses small terms.
    """
    return relu(logits) - logits * targets + log1p(exp(-abs(logits)))


def mean_squared_error(predictions: Array, targets: Array) -> Array:
    """Return the mean of ``(predictions - targets)**2`` over the last axis. Shape: ``(..., n) -> (...)``."""
    difference = predictions - targets
    return mean(difference * difference, axis=-1)
