"""What `import disttrain as dt` shows; the package itself imports this at the first use of a name of it."""

from disttrain import backend, checkpoint, comm, errors, initializers, layers, losses, metrics, optimizers
from disttrain.autodiff import Tensor, check_grads, grad, no_grad, op, ops, value_and_grad
from disttrain.comm import init
from disttrain.data import datasets
from disttrain.data_parallel import DataParallel, compression
from disttrain.kernels.precision import get_matmul_precision, set_matmul_precision
from disttrain.layers import Layer
from disttrain.training import Model, Sequential, callbacks, load_model, utils
from disttrain.training.utils import state_digest

__all__ = [
    "DataParallel",
    "Layer",
    "Model",
    "Sequential",
    "Tensor",
    "backend",
    "callbacks",
    "check_grads",
    "checkpoint",
    "comm",
    "compression",
    "datasets",
    "errors",
    "get_matmul_precision",
    "grad",
    "init",
    "initializers",
    "layers",
    "load_model",
    "losses",
    "metrics",
    "no_grad",
    "op",
    "ops",
    "optimizers",
    "set_matmul_precision",
    "state_digest",
    "utils",
    "value_and_grad",
]
