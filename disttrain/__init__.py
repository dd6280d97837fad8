"""disttrain: data-parallel training with the same result on any number of workers.

::

    import disttrain as dt

    model = dt.Sequential([dt.layers.Dense(128, activation="relu", input_shape=(784,)),
                           dt.layers.Dense(10, activation="softmax")])
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x_train, y_train, epochs=10, batch_size=128)

runs in one process as ``python train.py``, and unchanged among four as ``disttrain run -n 4 train.py`` or
``mpirun -n 4 python train.py``.
"""

from disttrain import backend, checkpoint, comm, errors, initializers, layers, losses, metrics, optimizers
from disttrain.autodiff import Tensor, check_grads, grad, no_grad, op, ops, value_and_grad
from disttrain.comm import init
from disttrain.data import datasets
from disttrain.layers import Layer
from disttrain.training import Model, Sequential, callbacks, load_model, utils
from disttrain.training.utils import state_digest

__version__ = "0.1.0"

__all__ = [
    "Layer",
    "Model",
    "Sequential",
    "Tensor",
    "backend",
    "callbacks",
    "check_grads",
    "checkpoint",
    "comm",
    "datasets",
    "errors",
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
    "state_digest",
    "utils",
    "value_and_grad",
]
