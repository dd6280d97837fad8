"""The same values and gradients as PyTorch, an implementation that shares nothing with this one."""

import numpy as np
import pytest

from disttrain import Tensor, grad, layers, ops
from disttrain.autodiff.ops.conv import same_padding
from disttrain.optimizers import SGD, Adam

torch = pytest.importorskip("torch", reason="PyTorch is not installed: an oracle of values and gradients")
functional = torch.nn.functional

RANDOM = np.random.default_rng(0)
# sums of fewer than 500 products below 10, added in another order by each side
TOLERANCE = {"rtol": 0, "atol": 2 * 500 * 10 * 2**-53}


def both(ours, theirs, *arrays):
    """Compare values and gradients of two functions, weighted at random so that no gradient is by chance right."""
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    others = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, z = ours(*tensors), theirs(*others)
    np.testing.assert_allclose(y.data, z.detach().numpy(), **TOLERANCE)
    weights = np.random.default_rng(1).standard_normal(y.shape)
    y.backward(weights)
    z.backward(torch.tensor(weights))
    for tensor, other in zip(tensors, others, strict=True):
        np.testing.assert_allclose(tensor.grad, other.grad.numpy(), **TOLERANCE)


def channels_first(x):
    return x.permute(0, 3, 1, 2)


def channels_last(x):
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_convolution(size, stride, padding):
    x, kernel = RANDOM.standard_normal((4, 9, 8, 3)), RANDOM.standard_normal((size, size, 3, 5))
    both(
        lambda x, k: ops.conv2d(x, k, strides=(stride, stride), padding=((padding, padding), (padding, padding))),
        lambda x, k: channels_last(
            functional.conv2d(channels_first(x), k.permute(3, 2, 0, 1), stride=stride, padding=padding)
        ),
        x,
        kernel,
    )


def test_transposed_convolution():
    g, kernel = RANDOM.standard_normal((2, 4, 4, 5)), RANDOM.standard_normal((3, 3, 2, 5))
    both(
        lambda g, k: ops.conv2d_input(g, k, size=(9, 9), strides=(2, 2), padding=((0, 0), (0, 0))),
        lambda g, k: channels_last(functional.conv_transpose2d(channels_first(g), k.permute(3, 2, 0, 1), stride=2)),
        g,
        kernel,
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # about its speed
def test_same_convolution():
    x, kernel = RANDOM.standard_normal((2, 6, 7, 2)), RANDOM.standard_normal((3, 4, 2, 3))
    both(
        lambda x, k: ops.conv2d(x, k, padding=same_padding((6, 7), (3, 4), (1, 1))),
        lambda x, k: channels_last(functional.conv2d(channels_first(x), k.permute(3, 2, 0, 1), padding="same")),
        x,
        kernel,
    )


@pytest.mark.parametrize(("size", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_pooling(size, stride, padding):
    x = np.round(RANDOM.standard_normal((2, 7, 6, 3)) * 2)  # with ties: PyTorch's go to the first as well
    window = {"size": (size, size), "strides": (stride, stride), "padding": ((padding, padding), (padding, padding))}
    both(
        lambda x: ops.max_pool2d(x, **window),
        lambda x: channels_last(functional.max_pool2d(channels_first(x), size, stride, padding)),
        x,
    )
    both(
        lambda x: ops.average_pool2d(x, **window),
        lambda x: channels_last(
            functional.avg_pool2d(channels_first(x), size, stride, padding, count_include_pad=False)
        ),
        x,
    )


def test_batch_normalization():
    def theirs(x, gamma, beta):
        return channels_last(functional.batch_norm(channels_first(x), None, None, gamma, beta, training=True, eps=1e-3))

    def ours(x, gamma, beta):
        return ops.batch_norm(x, *ops.moments(x), gamma, beta, epsilon=1e-3)

    both(ours, theirs, RANDOM.standard_normal((3, 4, 2, 5)), RANDOM.uniform(0.5, 2, 5), RANDOM.standard_normal(5))


def test_cross_entropies():
    logits, labels, bits = (
        RANDOM.standard_normal((6, 4)) * 30,
        RANDOM.integers(0, 4, 6),
        RANDOM.integers(0, 2, (6, 4)) * 1.0,
    )
    both(
        lambda z: ops.sparse_softmax_cross_entropy(z, labels),
        lambda z: functional.cross_entropy(z, torch.tensor(labels), reduction="none"),
        logits,
    )
    both(
        lambda z: ops.sigmoid_cross_entropy(z, bits),
        lambda z: functional.binary_cross_entropy_with_logits(z, torch.tensor(bits), reduction="none"),
        logits,
    )
    both(ops.log_softmax, lambda z: functional.log_softmax(z, -1), logits)


def test_indexing_reductions_and_products():
    def f(x, y):
        z = (x[:, None] @ y)[..., [0, 0, 2]]
        return (z / (1 + abs(z))).mean(-1) * x[:, :, 0].max() - x.sum((0, 2))[None] ** 2

    both(f, lambda x, y: f(x, y), RANDOM.standard_normal((3, 4, 2)), RANDOM.standard_normal((5, 2, 3))[:1])


def test_double_backward_of_a_network():
    x, w = RANDOM.standard_normal((4, 6, 6, 2)), RANDOM.standard_normal((3, 3, 2, 3)) / 4

    def penalty_here(w):
        f = lambda x: ops.tanh(ops.conv2d(x, w, padding=((1, 1), (1, 1)))).sum()  # noqa: E731
        slope = grad(f)(Tensor(x, requires_grad=True))
        return (slope * slope).sum().reshape(1)

    def penalty_there(w):
        inputs = torch.tensor(x, requires_grad=True)
        y = torch.tanh(functional.conv2d(channels_first(inputs), w.permute(3, 2, 0, 1), padding=1)).sum()
        (slope,) = torch.autograd.grad(y, inputs, create_graph=True)
        return (slope * slope).sum().reshape(1)

    tensor, other = Tensor(w, requires_grad=True), torch.tensor(w, requires_grad=True)
    penalty_here(tensor).backward()
    penalty_there(other).backward()
    scale = np.abs(other.grad.numpy()).max()
    np.testing.assert_allclose(tensor.grad, other.grad.numpy(), rtol=0, atol=1000 * 2**-53 * scale)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (
            lambda: Adam(0.1, epsilon=0.0),
            lambda p: torch.optim.Adam(p, 0.1, eps=0.0),
        ),  # epsilon has another place there
    ],
)
def test_training_a_network(ours, theirs):
    x, y = RANDOM.standard_normal((10, 4)), RANDOM.standard_normal((10, 1))
    first, second = layers.Dense(5, "tanh", dtype="float64"), layers.Dense(1, dtype="float64")
    second(first(x))
    weights = first.weights + second.weights
    others = [torch.tensor(w.data.copy(), requires_grad=True) for w in weights]
    optimizer, other_optimizer = ours(), theirs(others)
    for _ in range(5):
        ((second(first(x)) - y) ** 2).mean().backward()
        optimizer.apply([w.grad for w in weights], weights)
        k, b, k2, b2 = others
        other_optimizer.zero_grad()
        ((torch.tanh(torch.tensor(x) @ k + b) @ k2 + b2 - torch.tensor(y)) ** 2).mean().backward()
        other_optimizer.step()
        for weight in weights:
            weight.grad = None
    for weight, other in zip(weights, others, strict=True):
        # five steps, each of which may amplify the error of the one before by its second derivative, below 10
        np.testing.assert_allclose(weight.data, other.detach().numpy(), rtol=0, atol=10**5 * 50 * 2**-53)
