"""The ops: one file a family, one function with its rule an op."""

from disttrain.autodiff.ops.activation import elu, gelu, leaky_relu, selu, silu, softplus
from disttrain.autodiff.ops.attention import attention, attention_of_heads, attention_weights
from disttrain.autodiff.ops.conv import conv2d, conv2d_input, conv2d_kernel
from disttrain.autodiff.ops.elementwise import (
    abs,
    add,
    cast,
    clip,
    divide,
    exp,
    log,
    log1p,
    maximum,
    minimum,
    multiply,
    negative,
    power,
    relu,
    sigmoid,
    sqrt,
    subtract,
    tanh,
    where,
)
from disttrain.autodiff.ops.embedding import embedding
from disttrain.autodiff.ops.erf import erf
from disttrain.autodiff.ops.loss import (
    mean_squared_error,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    sparse_softmax_cross_entropy,
)
from disttrain.autodiff.ops.matrix import dense, matmul
from disttrain.autodiff.ops.normalization import batch_norm, batch_norm_of_batch, layer_norm, moments
from disttrain.autodiff.ops.pooling import average_pool2d, max_pool2d
from disttrain.autodiff.ops.random import dropout
from disttrain.autodiff.ops.recurrent import gru, lstm
from disttrain.autodiff.ops.reduction import max, mean, sum
from disttrain.autodiff.ops.shape import (
    broadcast_to,
    concatenate,
    getitem,
    pick,
    reshape,
    stack,
    sum_to,
    transpose,
)
from disttrain.autodiff.ops.softmax import log_softmax, softmax

__all__ = [
    "abs",
    "add",
    "attention",
    "attention_of_heads",
    "attention_weights",
    "average_pool2d",
    "batch_norm",
    "batch_norm_of_batch",
    "broadcast_to",
    "cast",
    "clip",
    "concatenate",
    "conv2d",
    "conv2d_input",
    "conv2d_kernel",
    "dense",
    "divide",
    "dropout",
    "elu",
    "embedding",
    "erf",
    "exp",
    "gelu",
    "getitem",
    "gru",
    "layer_norm",
    "leaky_relu",
    "log",
    "log1p",
    "log_softmax",
    "lstm",
    "matmul",
    "max",
    "max_pool2d",
    "maximum",
    "mean",
    "mean_squared_error",
    "minimum",
    "moments",
    "multiply",
    "negative",
    "pick",
    "power",
    "relu",
    "reshape",
    "selu",
    "sigmoid",
    "sigmoid_cross_entropy",
    "silu",
    "softmax",
    "softmax_cross_entropy",
    "softplus",
    "sparse_softmax_cross_entropy",
    "sqrt",
    "stack",
    "subtract",
    "sum",
    "sum_to",
    "tanh",
    "transpose",
    "where",
]
