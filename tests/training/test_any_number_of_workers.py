"""N workers train the model that one worker trains, and know the same about it."""

import dataclasses
import functools

import numpy as np
import pytest

import disttrain as dt
from disttrain import backend
from disttrain.comm import threads
from disttrain.data import Batches
from tests.training import worlds

pytestmark = pytest.mark.timeout(60)

WORLD_SIZES = [1, 2, 3, 4, 5, 8]
EPOCHS = 2
SAMPLES = 47
STEPS = EPOCHS * -(-SAMPLES // 13)
# Workers differ from one in the order of sums only. The longest has 13 samples of 64 pixels, so that its error is at
# most 832 * 2**-53 = 1e-13 of the terms' size, in each of the steps; 1e-10 leaves a hundredfold to what training,
# which is not chaotic over so few steps, makes of it.
FLOAT64 = 1e-10
# The same count for float32, 832 * 2**-24 in each step: an upper bound, the errors being random.
FLOAT32 = 832 * 2**-24 * STEPS

OPTIMIZERS = {
    "adam": lambda: dt.optimizers.Adam(0.01),
    "adamw": lambda: dt.optimizers.AdamW(0.01),
    "sgd": lambda: dt.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
}
METRICS = ("accuracy", "precision", "recall", "f1_score")


def train(comm, optimizer, batch_size, *, shuffle=True):
    """Return all that one can know of a training: on every rank it must be the same."""
    model = worlds.conv_net(OPTIMIZERS[optimizer](), METRICS)
    x, y = worlds.digits(SAMPLES)
    x_test, y_test = worlds.digits(19, start=100)
    history = model.fit(
        x, y, batch_size, EPOCHS, verbose=0, validation_data=(x_test, y_test), shuffle=shuffle
    )  # fmt: skip
    return {
        "history": {name: np.array(values) for name, values in history.history.items()},
        "weights": worlds.weights(model),
        "evaluate": model.evaluate(x_test, y_test, batch_size=7, return_dict=True),
        "predict": model.predict(x_test, batch_size=3),
        "digest": dt.state_digest(model),
    }


@functools.cache
def train_alone(floatx, *args):
    backend.set_floatx(floatx)
    return worlds.alone(train, *args)


def assert_one_result(results):
    for result in results[1:]:
        assert result["digest"] == results[0]["digest"]
        worlds.assert_equal(result["history"], results[0]["history"])
        assert result["predict"].tobytes() == results[0]["predict"].tobytes()
        for name, value in result["evaluate"].items():
            np.testing.assert_array_equal(value, results[0]["evaluate"][name])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("optimizer", "batch_size"), [("adam", 13), ("sgd", 13), ("adamw", 3)])
def test_workers_agree_with_one_in_float64(float64, world_size, optimizer, batch_size):
    # the last batch has 8 samples of 13, or 2 of 3: with more workers than that, some have none
    one = train_alone("float64", optimizer, batch_size)
    results = threads.run(world_size, train, optimizer, batch_size)
    assert_one_result(results)
    worlds.assert_close(results[0]["weights"], one["weights"], FLOAT64)
    worlds.assert_close(results[0]["history"], one["history"], FLOAT64)
    worlds.assert_close({"y": results[0]["predict"]}, {"y": one["predict"]}, FLOAT64)
    assert results[0]["predict"].shape == (19, 10)
    # counts of right answers are whole numbers: no prediction is so near to a threshold that rounding moves it
    for name in METRICS:
        np.testing.assert_array_equal(results[0]["evaluate"][name], one["evaluate"][name])
        np.testing.assert_array_equal(results[0]["history"][name], one["history"][name])
    assert results[0]["evaluate"]["loss"] == pytest.approx(one["evaluate"]["loss"], rel=FLOAT64)


@pytest.mark.parametrize("world_size", [2, 5, 8])
def test_workers_agree_with_one_in_float32(world_size):
    one = train_alone("float32", "sgd", 13)
    results = threads.run(world_size, train, "sgd", 13)
    assert_one_result(results)
    assert results[0]["predict"].dtype == "float32"
    worlds.assert_close(results[0]["weights"], one["weights"], FLOAT32)
    worlds.assert_close({"loss": results[0]["history"]["loss"]}, {"loss": one["history"]["loss"]}, FLOAT32)


def test_the_comparison_notices_a_mean_per_rank(float64, monkeypatch):
    # what data-parallel training often does: each rank divides by its own number of samples
    right = Batches.batch

    def wrong(batches, epoch, step):
        batch = right(batches, epoch, step)
        return dataclasses.replace(batch, global_size=max(1, len(batch.x)) * batches.world_size)

    one = train_alone("float64", "sgd", 13)
    monkeypatch.setattr(Batches, "batch", wrong)
    with pytest.raises(AssertionError):
        worlds.assert_close(threads.run(3, train, "sgd", 13)[0]["weights"], one["weights"], FLOAT64)


def test_shuffling_matters_to_the_result(float64):
    shuffled = train_alone("float64", "sgd", 13)
    straight = worlds.alone(functools.partial(train, shuffle=False), "sgd", 13)
    assert shuffled["digest"] != straight["digest"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_train_on_batch_takes_the_step_of_one_worker(float64, world_size):
    x, y = worlds.digits(11)

    def steps(comm):
        model = worlds.conv_net(OPTIMIZERS["adam"]())
        logs = [model.train_on_batch(x, y), model.train_on_batch(x[:2], y[:2])]
        return logs, worlds.weights(model), model.optimizer.iterations

    logs, weights, iterations = worlds.alone(steps)
    assert iterations == 2
    for other, others, count in threads.run(world_size, steps):
        assert count == 2
        worlds.assert_close(others, weights, FLOAT64)
        for mine, theirs in zip(other, logs, strict=True):
            assert mine == pytest.approx(theirs, rel=FLOAT64)


def test_the_epoch_s_loss_is_the_mean_over_its_samples(float64):
    # a learning rate of 0 and no dropout: then every batch's loss is that of the same weights
    x, y = worlds.blobs(23)

    def losses(comm):
        model = worlds.dense_net(dt.optimizers.SGD(0.0))
        return model.fit(x, y, batch_size=10, verbose=0).history["loss"][0], model.evaluate(x, y), model.predict(x)

    for trained, evaluated, predicted in threads.run(3, losses):
        expected = -np.log(predicted[np.arange(23), y]).mean()
        assert trained == pytest.approx(expected, rel=1e-13)
        assert evaluated == pytest.approx(expected, rel=1e-13)


def unsynchronized(comm):
    first = dt.layers.BatchNormalization(momentum=0.5, synchronized=False, input_shape=(4,))
    model = dt.Sequential([first, dt.layers.Dense(3, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = worlds.blobs(7)
    model.fit(x, y, batch_size=5, epochs=1, shuffle=False, verbose=0)
    fitted = worlds.weights(model)
    predicted = model.predict(x)
    return fitted, predicted, model.evaluate(x, y), dt.state_digest(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_unsynchronized_batch_normalization_keeps_the_averages_of_rank_0(float64, world_size):
    # batches of 5 and 2 samples: rank 0 sees the first of each; rank 2 of 3 sees none of the second
    x, _ = worlds.blobs(7)
    mean = np.zeros(4)
    for part in (x[: -(-5 // world_size)], x[5:6]):
        mean = 0.5 * mean + 0.5 * part.mean(axis=0)
    results = threads.run(world_size, unsynchronized)
    for fitted, predicted, loss, digest in results:
        np.testing.assert_allclose(fitted["batch_normalization/moving_mean"], mean, rtol=1e-12)
        np.testing.assert_array_equal(predicted, results[0][1])
        assert loss == results[0][2]
        assert digest == results[0][3]


def test_evaluate_uses_the_averages_of_rank_0_too(float64):
    x, y = worlds.blobs(8)

    def ask(comm):
        model = dt.Sequential(
            [
                dt.layers.BatchNormalization(momentum=0.5, synchronized=False, input_shape=(4,)),
                dt.layers.Dense(3, activation="softmax"),
            ]
        )
        model.compile("sgd", "sparse_categorical_crossentropy")
        model.train_on_batch(x, y)
        return model.evaluate(x, y), model.predict(x)

    for loss, predicted in threads.run(2, ask):
        assert loss == pytest.approx(-np.log(predicted[np.arange(8), y]).mean(), rel=1e-13)
