"""The error function, activations made of it, layer normalization, embedding, attention."""

import math

import numpy as np

from disttrain import ops
from disttrain.backend import get_array_module
from tests.autodiff import naive
from tests.autodiff.cases.case import case

SHAPES = {"sizes": (3, 4), "cube": (2, 1, 5), "one": (1, 1)}


def each(function):
    """Return `function` of Python's floats, number by number, as a function of arrays."""
    return lambda x: np.array([function(float(v)) for v in x.flat]).reshape(x.shape)


UNARY = {
    "elu": each(lambda v: v if v > 0 else math.exp(v) - 1),
    "erf": each(math.erf),
    "gelu": each(lambda v: v * math.erfc(-v / 2**0.5) / 2),
    "leaky_relu": each(lambda v: v if v > 0 else v / 5),
    "selu": each(lambda v: 1.0507009873554805 * (v if v > 0 else 1.6732632423543772 * (math.exp(v) - 1))),
    "silu": each(lambda v: v / (1 + math.exp(-v))),
    "softplus": each(lambda v: math.log(1 + math.exp(v))),
}
for name, oracle in UNARY.items():
    for label, shape in SHAPES.items():
        case(name, label, getattr(ops, name), oracle, shape, values="distinct", batched=(0,))
case(
    "gelu",
    "approximate",
    lambda x: ops.gelu(x, approximate=True),
    each(lambda v: v / (1 + math.exp(-2 * (2 / math.pi) ** 0.5 * (v + 0.044715 * v**3)))),
    (3, 4),
    batched=(0,),
)
case("erf", "further out", lambda x: ops.erf(x * 2), each(lambda v: math.erf(2 * v)), (7, 3), batched=(0,))
case(
    "elu", "alpha", lambda x: ops.elu(x, alpha=0.3), each(lambda v: v if v > 0 else 0.3 * math.expm1(v)), (3, 2),
    values="distinct", batched=(0,),
)  # fmt: skip
case(
    "leaky_relu", "slope", lambda x: ops.leaky_relu(x, negative_slope=-0.5),
    each(lambda v: v if v > 0 else -0.5 * v), (3, 2), values="distinct", batched=(0,),
)  # fmt: skip


def _layer_norm(x, gamma, beta):
    y = np.empty_like(x)
    for at in np.ndindex(x.shape[:-1]):
        mean = sum(x[at]) / x.shape[-1]
        variance = sum((v - mean) ** 2 for v in x[at]) / x.shape[-1]
        y[at] = [(v - mean) / math.sqrt(variance + 0.1) * a + b for v, a, b in zip(x[at], gamma, beta, strict=True)]
    return y


for label, shape in {"rows": (3, 4), "steps": (2, 3, 5), "one": (2, 1)}.items():
    case(
        "layer_norm",
        label,
        lambda x, gamma, beta: ops.layer_norm(x, gamma, beta, epsilon=0.1),
        _layer_norm,
        shape,
        shape[-1:],
        shape[-1:],
        batched=(0,),
    )

ROWS = {"one each": np.array([2, 0, 1]), "steps": np.array([[2, 0, 2, 2], [1, 1, 0, 2], [0, 2, 0, 0]])}
for label, rows in ROWS.items():
    case(
        "embedding",
        label,
        # no samples, no rows: the empty batch of the table
        lambda table, r=rows: ops.embedding(r[: table.shape[0]], table),
        lambda table, r=rows: np.array([table[i] for i in r.flat]).reshape(*r.shape, -1),
        (3, 4),
        batched=(0,),
    )
case("embedding", "a number", lambda table: ops.embedding(np.int32(4), table), lambda table: table[4], (5, 2))
case(
    "embedding",
    "floats",
    lambda table: ops.embedding(get_array_module(table).asarray([[3.0, 1.0]]), table),
    lambda table: np.stack([[table[3], table[1]]]),
    (4, 1),
)


def weights(query, key, mask=None, causal=False):
    """Return the weights of attention, number by number; a key that is not seen is left out of the softmax."""
    y = np.zeros((*query.shape[:-1], key.shape[-2]))
    mask = np.broadcast_to(1 if mask is None else mask, y.shape)
    for at in np.ndindex(y.shape[:-1]):
        seen = [j for j in range(key.shape[-2]) if mask[at][j] and not (causal and j > at[-1])]
        scores = [sum(query[at] * key[at[:-1]][j]) / math.sqrt(key.shape[-1]) for j in seen]
        y[at][seen] = naive.softmax(np.array(scores))
    return y


def attention(query, key, value, mask=None, causal=False):
    """Return attention by the loop over its sums."""
    y = np.zeros((*query.shape[:-1], value.shape[-1]))
    share = weights(query, key, mask, causal)
    for at in np.ndindex(share.shape):
        y[at[:-1]] += share[at] * value[at[:-2]][at[-1]]
    return y


MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0]])
SEEN = {
    "all": {},
    "causal": {"causal": True},
    "mask": {"mask": MASK == 1},
    "both": {"mask": MASK | np.eye(3, 4, dtype=int), "causal": True},
}
for label, options in SEEN.items():
    for shape, q, k, v in (("matrices", (3, 2), (4, 2), (4, 5)), ("heads", (2, 2, 3, 1), (2, 2, 4, 1), (2, 2, 4, 3))):
        batched = (0, 1, 2) if shape == "heads" else ()
        case(
            "attention",
            f"{label} {shape}",
            lambda q, k, v, o=options: ops.attention(q, k, v, **o),
            lambda q, k, v, o=options: attention(q, k, v, **o),
            q,
            k,
            v,
            batched=batched,
        )
        case(
            "attention_weights",
            f"{label} {shape}",
            lambda q, k, o=options: ops.attention_weights(q, k, **o),
            lambda q, k, o=options: weights(q, k, **o),
            q,
            k,
            batched=batched[:2],
        )


def _of_heads(q, k, v, heads, **options):
    """Return `attention`, head by head."""
    parts = [np.split(x, heads, axis=2) for x in (q, k, v)]
    mask = options.pop("mask", None)
    masks = [None if mask is None else np.broadcast_to(mask, (2, 2, 3, 4))[:, h] for h in range(heads)]
    return np.concatenate([attention(*each, mask=m, **options) for *each, m in zip(*parts, masks, strict=True)], axis=2)


EACH_HEAD = np.array([[[[1]], [[0]]]]) | (np.arange(48).reshape(2, 2, 3, 4) % 5 < 2)
for label, options in {**SEEN, "each head": {"mask": EACH_HEAD}}.items():
    for shape, queries, width, n in (("of two", 3, 4, 6), ("alike", 4, 2, 2)):
        if "mask" in options and queries == 4:
            continue
        case(
            "attention_of_heads",
            f"{label} {shape}",
            lambda q, k, v, o=options: ops.attention_of_heads(q, k, v, heads=2, **o),
            lambda q, k, v, o=options: _of_heads(q, k, v, 2, **o),
            (2, queries, width),
            (2, 4, width),
            (2, 4, n),
            batched=(0, 1, 2) if label != "each head" else (),
        )
