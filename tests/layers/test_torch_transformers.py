"""The same values and gradients as PyTorch: gelu, layer normalization, embedding, attention."""

import numpy as np
import pytest

from disttrain import Tensor, layers, ops

torch = pytest.importorskip("torch", reason="PyTorch is not installed: an oracle of values and gradients")
functional = torch.nn.functional

RANDOM = np.random.default_rng(0)
# sums of fewer than 200 products below 10, added in another order by each side
TOLERANCE = {"rtol": 0, "atol": 2 * 200 * 10 * 2**-53}


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


X = RANDOM.standard_normal((4, 5, 6)) * 2
ACTIVATIONS = {
    "elu": (lambda x: ops.elu(x, alpha=0.7), lambda x: functional.elu(x, 0.7)),
    "erf": (ops.erf, torch.erf),
    "gelu": (ops.gelu, functional.gelu),
    "gelu, approximate": (lambda x: ops.gelu(x, approximate=True), lambda x: functional.gelu(x, approximate="tanh")),
    "leaky_relu": (ops.leaky_relu, lambda x: functional.leaky_relu(x, 0.2)),
    "selu": (ops.selu, functional.selu),
    "silu": (ops.silu, functional.silu),
    "softplus": (ops.softplus, functional.softplus),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    both(*ACTIVATIONS[name], X)


def test_layer_normalization():
    both(
        lambda x, gamma, beta: ops.layer_norm(x, gamma, beta, epsilon=1e-3),
        lambda x, gamma, beta: functional.layer_norm(x, (6,), gamma, beta, 1e-3),
        X, RANDOM.standard_normal(6), RANDOM.standard_normal(6),
    )  # fmt: skip


def test_embedding():
    indices = RANDOM.integers(0, 9, (7, 5))
    both(
        lambda table: ops.embedding(indices, table),
        lambda table: functional.embedding(torch.tensor(indices), table),
        RANDOM.standard_normal((9, 4)),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    both(
        lambda q, k, v: ops.attention(q, k, v, causal=causal),
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal),
        *[RANDOM.standard_normal((2, 3, 5, 4)) for _ in range(3)],
    )


def test_multi_head_attention():
    ours = layers.MultiHeadAttention(2, 3, dtype="float64", bias_initializer=lambda g, shape: g.standard_normal(shape))
    theirs = torch.nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    ours(X, X)
    w = {weight.name.removeprefix(ours.path + "/"): weight.data for weight in ours.weights}
    projections = [w[f"{name}/kernel"].reshape(6, 6).T for name in ("query", "key", "value")]
    with torch.no_grad():
        theirs.in_proj_weight[:] = torch.tensor(np.concatenate(projections))
        biases = [w[f"{name}/bias"].ravel() for name in ("query", "key", "value")]
        theirs.in_proj_bias[:] = torch.tensor(np.concatenate(biases))
        theirs.out_proj.weight[:] = torch.tensor(w["attention_output/kernel"].reshape(6, 6).T)
        theirs.out_proj.bias[:] = torch.tensor(w["attention_output/bias"])
    hidden = torch.tensor(np.tri(5) == 0)
    both(
        lambda x: ours(x, x, use_causal_mask=True),
        lambda x: theirs(x, x, x, attn_mask=hidden, need_weights=False)[0],
        X,
    )
    both(
        lambda x: ours(x, x, return_attention_scores=True)[1],
        lambda x: theirs(x, x, x, average_attn_weights=False)[1],
        X,
    )
