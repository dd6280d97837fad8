"""Ranks in threads, and the small models and data that they train."""

import numpy as np

import disttrain as dt
from disttrain.comm import threads
from disttrain.errors import DisttrainError

LAYERS = dt.layers


def alone(function, *args):
    """Return what ``function(comm, *args)`` returns on a single worker."""
    with dt.comm.use(dt.comm.connect("local")) as comm:
        return function(comm, *args)


def errors(world_size, function):
    """Return for each rank the error of disttrain's that ``function(comm)`` ends with there.

    A rank that meets its error has returned; a rank that still waits for it then gets a CommError, not a hang.
    """

    def outcome(comm):
        try:
            function(comm)
        except DisttrainError as error:
            return error
        return None

    return threads.run(world_size, outcome)


def agreed(world_size, function):
    """Return the message that ``function(comm)`` ends with, after finding its class equal on all ranks.

    The rank on which it arose speaks for itself, the others name that rank.
    """
    found = errors(world_size, function)
    assert len({type(error) for error in found}) == 1, found
    own = [str(e) for e in found if not str(e).startswith("rank ")] or [str(found[0])]
    assert len(set(own)) == 1, found
    assert all(str(e).endswith(own[0]) for e in found), found
    return type(found[0]), own[0]


def digits(samples, start=0):
    """Return that many images, shape ``(n, 8, 8, 1)``, from 0 to 1, and their labels."""
    (x, y), _ = dt.datasets.digits.load_data()
    return x[start : start + samples, ..., None] / 16, y[start : start + samples]


def blobs(samples=20, features=4, classes=3):
    """Return seeded random inputs and labels."""
    generator = np.random.default_rng(1)
    return generator.normal(size=(samples, features)), generator.integers(0, classes, samples)


def conv_net(optimizer="adam", metrics=("accuracy",)):
    """Return a compiled classifier of digits with everything in it that could depend on how a batch is shared."""
    model = dt.Sequential(
        [
            LAYERS.Conv2D(4, 3, padding="same", activation="relu", input_shape=(8, 8, 1)),
            LAYERS.BatchNormalization(momentum=0.8),
            LAYERS.MaxPooling2D(),
            LAYERS.Conv2D(6, 3, strides=2, padding="same"),
            LAYERS.BatchNormalization(),
            LAYERS.Activation("tanh"),
            LAYERS.Flatten(),
            LAYERS.Dropout(0.3),
            LAYERS.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", list(metrics))
    return model


def dense_net(optimizer="sgd", metrics=(), *, dropout=0.0):
    """Return a compiled classifier of `blobs`."""
    model = dt.Sequential(
        [
            LAYERS.Dense(5, activation="tanh", input_shape=(4,)),
            LAYERS.Dropout(dropout),
            LAYERS.Dense(3, activation="softmax"),
        ]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", list(metrics))
    return model


def weights(model):
    """Return copies of all weights by name."""
    return {w.name: w.data.copy() for w in model.weights}


def assert_equal(ours, theirs):
    """Assert that two dicts of arrays hold the same names and bits."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name, strict=True)


def assert_close(ours, theirs, tolerance):
    """Assert that two dicts of arrays hold the same names, and values that differ by `tolerance` of the largest."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        scale = np.abs(theirs[name]).max()
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=tolerance * max(scale, 1), err_msg=name)
