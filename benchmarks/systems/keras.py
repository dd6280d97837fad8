"""Keras on TensorFlow, as one would use it: `compile` with a metric, then `train_on_batch`, `predict`, `fit`."""

import os
from collections.abc import Sequence
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"  # before Keras is imported
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

from benchmarks.architecture import Conv, Dense, Flatten, MaxPool, Part
from benchmarks.systems import AbsentError, Built
from benchmarks.systems.tensorflow import product
from benchmarks.workloads import Workload

__all__ = ["PACKAGES", "PRECISION", "build", "product", "variants"]
PACKAGES = ("keras", "tensorflow")
PRECISION = "float32"


def variants(workload: Workload, task: str) -> Sequence[str]:
    """Return "graph" and "xla"."""
    return ("graph", "xla")


def build(workload: Workload, variant: str) -> Built:
    """Return the compiled model.

    Raises:
        AbsentError: the workload has more than dense layers, convolutions and pooling, or another rule than Adam.
    """
    if workload.optimizer.name != "adam":
        raise AbsentError(f"there is no {workload.optimizer.name} of Keras here")
    x, y = workload.batch()
    model = keras.Sequential([keras.Input(x.shape[1:]), *map(_layer, workload.parts)])
    model.compile(
        optimizer=keras.optimizers.Adam(workload.optimizer.learning_rate, epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=variant == "xla",
    )
    model.set_weights(list(workload.weights()))
    size = len(x)

    def step() -> Any:
        model.reset_metrics()  # else the loss is the mean of all steps
        return model.train_on_batch(x, y)[0]

    return Built(
        parameters=model.count_params(),
        step=step,
        predict=lambda x: model.predict(x, batch_size=size, verbose=0),
        epoch=lambda x, y: model.fit(x, y, batch_size=size, verbose=0),
    )


def _layer(part: Part) -> Any:
    match part:
        case Dense():
            return keras.layers.Dense(part.units, part.activation, use_bias=part.use_bias)
        case Conv(padding=0):
            return keras.layers.Conv2D(
                part.filters, part.size, part.stride, activation=part.activation, use_bias=part.use_bias
            )
        case MaxPool():
            return keras.layers.MaxPooling2D(part.size)
        case Flatten():
            return keras.layers.Flatten()
        case _:
            raise AbsentError(f"there is no {type(part).__name__} of Keras here")
