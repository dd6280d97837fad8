"""Convolution, pooling, normalization, dropout."""

import hashlib

import numpy as np

from disttrain import ops
from disttrain.autodiff.op import array_of
from disttrain.backend import get_array_module
from tests.autodiff import naive
from tests.autodiff.cases.case import case

WINDOWS = {
    "plain": ((2, 3), (1, 1), naive.VALID),
    "strided": ((2, 2), (2, 3), naive.VALID),
    "padded": ((3, 2), (2, 1), ((1, 1), (0, 1))),
    "one": ((1, 1), (1, 1), naive.VALID),
}
X = (2, 5, 4, 2)
for label, (size, strides, padding) in WINDOWS.items():
    window = {"strides": strides, "padding": padding}
    pool = {"size": size, **window}
    out = naive.conv2d(np.zeros(X), np.zeros((*size, 2, 1)), strides, padding).shape
    case(
        "conv2d",
        label,
        lambda x, k, w=window: ops.conv2d(x, k, **w),
        lambda x, k, w=window: naive.conv2d(x, k, **w),
        X,
        (*size, 2, 1),
        batched=(0,),
    )
    case(
        "conv2d",
        f"{label} bias and relu",
        lambda x, k, b, w=window: ops.conv2d(x, k, b, **w, activation="relu"),
        lambda x, k, b, w=window: np.maximum(naive.conv2d(x, k, **w) + b, 0),
        X,
        (*size, 2, 3),
        (3,),
        batched=(0,),
    )
    case(
        "conv2d_input",
        label,
        lambda g, k, w=window: ops.conv2d_input(g, k, size=X[1:3], **w),
        lambda g, k, w=window: _adjoint(lambda x: naive.conv2d(x, k, **w), X, g),
        out,
        (*size, 2, 1),
        batched=(0,),
    )
    case(
        "conv2d_kernel",
        label,
        lambda x, g, w=window, s=size: ops.conv2d_kernel(x, g, size=s, **w),
        lambda x, g, w=window, s=size: _adjoint(lambda k: naive.conv2d(x, k, **w), (*s, 2, 1), g),
        X,
        out,
        batched=(0, 1),
    )
    case(
        "max_pool2d",
        label,
        lambda x, p=pool: ops.max_pool2d(x, **p),
        lambda x, p=pool: naive.pool2d(x, **p, reduce=max),
        X,
        values="distinct",
        batched=(0,),
    )
    case(
        "average_pool2d",
        label,
        lambda x, p=pool: ops.average_pool2d(x, **p),
        lambda x, p=pool: naive.pool2d(x, **p, reduce=lambda v: sum(v) / len(v)),
        X,
        batched=(0,),
    )


def _adjoint(linear, shape, g):
    """Return the transpose of `linear`, column by column, applied to `g`."""
    y = np.zeros(shape)
    for at in np.ndindex(shape):
        unit = np.zeros(shape)
        unit[at] = 1
        y[at] = (linear(unit) * g).sum()
    return y


case(
    "moments",
    "channels",
    lambda x: ops.concatenate(ops.moments(x)),
    lambda x: np.array([*[c.mean() for c in x.T], *[((c - c.mean()) ** 2).mean() for c in x.T]]),
    (5, 3),
)
case(
    "moments",
    "images",
    lambda x: ops.stack(ops.moments(x), axis=1),
    lambda x: np.array([[c.mean(), c.var()] for c in x.reshape(-1, 2).T]),
    (2, 2, 1, 2),
)


def _with_others(part):
    return part + get_array_module(array_of(part)).asarray([1.0, -1, 2])


def _moments_with(x):
    """Return moments where two more values sum up to 1 and -1, and their squared deviations too."""
    others = np.array([1, -1])
    mean = (x.sum(0) + others) / (len(x) + 2)
    return np.concatenate([mean, (((x - mean) ** 2).sum(0) + others) / (len(x) + 2)])


case(
    "moments",
    "elsewhere",
    lambda x: ops.concatenate(ops.moments(x, total=_with_others)),
    _moments_with,
    (3, 2),
    batched=(0,),
)
case(
    "batch_norm",
    "channels",
    lambda x, *rest: ops.batch_norm(x, *rest, epsilon=0.1),
    lambda x, mean, variance, gamma, beta: gamma * (x - mean) / (variance + 0.1) ** 0.5 + beta,
    (3, 2),
    *[(2,)] * 4,
    values=("normal", "normal", "positive", "normal", "normal"),
    batched=(0,),
)


def _normalized(x, gamma, beta):
    flat = x.reshape(-1, x.shape[-1])
    return gamma * (x - flat.mean(0)) / (flat.var(0) + 0.1) ** 0.5 + beta


for label, shape in {"rows": (4, 3), "images": (2, 2, 1, 2)}.items():
    case(
        "batch_norm_of_batch",
        label,
        lambda *args: ops.batch_norm_of_batch(*args, epsilon=0.1)[0],
        _normalized,
        shape,
        shape[-1:],
        shape[-1:],
    )


def _with_half_as_many(part):
    """Add what others have: half as many values, with the same moments; where there are none, one value."""
    return part * 1.5 if array_of(part)[-1] else part + 1.0


case(
    "batch_norm_of_batch",
    "elsewhere",
    lambda x: ops.batch_norm_of_batch(x, 1.0, 0.0, epsilon=0.1, total=_with_half_as_many)[0],
    lambda x: _normalized(x, 1.0, 0.0),
    (4, 3),
    batched=(0,),
)


def _dropout(x):
    return ops.dropout(x, rate=0.25, key=(1, "mask"), first=3)


def _dropped(x):
    words = np.random.Philox(key=_philox_key("int:1\x1fstr:mask"), counter=3).random_raw(4 * x.shape[0])
    kept = words.view(np.uint32).reshape(x.shape[0], 8)[:, : x.shape[1]] >= 2**30
    return np.where(kept, x / 0.75, 0)


def _philox_key(text):
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")


case("dropout", "a quarter", _dropout, _dropped, (4, 5), batched=(0,))
