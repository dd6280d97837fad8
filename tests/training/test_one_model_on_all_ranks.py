"""All ranks hold one model and read the same data, or all of them are told what differs."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.comm import threads
from disttrain.errors import CommError, DataError
from tests.training import worlds

pytestmark = pytest.mark.timeout(30)


def test_the_weights_of_rank_0_are_everybody_s():
    x, y = worlds.blobs()

    def begin(comm):
        model = worlds.dense_net(dt.optimizers.SGD(0.0))
        for weight in model.weights:
            weight.data += comm.rank
        before = worlds.weights(model)
        model.fit(x, y, verbose=0)
        return before, worlds.weights(model), dt.state_digest(model)

    results = threads.run(3, begin)
    of_rank_0, digest = results[0][0], results[0][2]
    assert (results[1][0]["dense/kernel"] != of_rank_0["dense/kernel"]).all()
    for _, after, others in results:
        worlds.assert_equal(after, of_rank_0)
        assert others == digest


def test_evaluate_alone_gives_ranks_the_weights_of_rank_0():
    x, y = worlds.blobs()

    def ask(comm):
        model = worlds.dense_net()
        model.weights[0].data += comm.rank
        return model.evaluate(x, y)

    assert len(set(threads.run(3, ask))) == 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_models_that_differ_name_the_first_weight_of_both(world_size):
    x, y = worlds.blobs()

    def build(comm):
        hidden = 7 if comm.rank == world_size - 1 else 5
        layers = [dt.layers.Dense(4, input_shape=(4,)), dt.layers.Dense(hidden), dt.layers.Dense(3)]
        model = dt.Sequential(layers)
        model.compile("sgd", dt.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, verbose=0)

    kind, message = worlds.agreed(world_size, build)
    assert kind is CommError
    assert "rank 0 has ['dense_1/kernel', [4, 5], 'float32', True]" in message
    assert f"rank {world_size - 1} has ['dense_1/kernel', [4, 7], 'float32', True]" in message
    assert "every rank must build the same model" in message


@pytest.mark.parametrize("what", ["one layer more", "a frozen layer", "another name", "another dtype"])
def test_models_that_differ_otherwise_are_found_too(what):
    x, y = worlds.blobs()

    def build(comm):
        odd = comm.rank == 1
        kwargs = {
            "trainable": not (odd and what == "a frozen layer"),
            "name": "other" if odd and what == "another name" else None,
            "dtype": "float64" if odd and what == "another dtype" else None,
        }
        model = dt.Sequential([dt.layers.Dense(3, input_shape=(4,), **kwargs)])
        if odd and what == "one layer more":
            model.add(dt.layers.Dense(3))
        model.compile("sgd", dt.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, verbose=0)

    kind, message = worlds.agreed(3, build)
    assert kind is CommError
    expected = {
        "one layer more": "rank 0 has 2 entries, rank 1 has 4 entries",
        "a frozen layer": "rank 1 has ['dense/kernel', [4, 3], 'float32', False]",
        "another name": "rank 1 has ['other/kernel', [4, 3], 'float32', True]",
        "another dtype": "rank 1 has ['dense/kernel', [4, 3], 'float64', True]",
    }
    assert expected[what] in message


@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch"])
@pytest.mark.parametrize("what", ["number of samples", "values of x", "values of y"])
def test_data_that_differ_are_an_error_on_all_ranks(method, what):
    def give(comm):
        x, y = worlds.blobs(20)
        if comm.rank == 1 and what == "number of samples":
            x, y = x[:19], y[:19]
        if comm.rank == 1 and what == "values of x":
            x = x[::-1].copy()
        if comm.rank == 1 and what == "values of y":
            y = (y + 1) % 3
        model = worlds.dense_net()
        getattr(model, method)(x, y, **({"verbose": 0} if method == "fit" else {}))

    kind, message = worlds.agreed(3, give)
    assert kind is CommError
    assert "rank 0 has" in message
    assert "rank 1 has" in message
    assert "every rank must be given the same" in message


@pytest.mark.parametrize("what", ["batch_size", "shuffle", "epochs", "validation_data"])
def test_arguments_of_fit_that_differ_are_an_error_on_all_ranks(what):
    x, y = worlds.blobs(20)
    one = {"batch_size": 5, "shuffle": True, "epochs": 1, "validation_data": (x, y)}
    other = {"batch_size": 4, "shuffle": False, "epochs": 2, "validation_data": (x[1:], y[1:])}

    def fit(comm):
        arguments = one if comm.rank < 2 else {**one, what: other[what]}
        worlds.dense_net().fit(x, y, verbose=0, **arguments)

    assert worlds.agreed(3, fit)[0] is CommError


def test_predict_of_inputs_that_differ_is_an_error_on_all_ranks():
    x, _ = worlds.blobs(20)

    def ask(comm):
        worlds.dense_net().predict(x[: 20 - 5 * comm.rank])

    assert worlds.agreed(2, ask)[0] is CommError


def test_labels_that_are_wrong_on_one_rank_only_are_an_error_on_all():
    def fit(comm):
        x, y = worlds.blobs(20)
        y[6] = 3 if comm.rank == 1 else y[6]
        worlds.dense_net().fit(x, y, verbose=0)

    found = worlds.errors(3, fit)
    text = "label 3 of sample 6 is outside the classes 0 to 2 (1 of 20 labels are)"
    assert [type(error) for error in found] == [DataError] * 3
    assert [str(error).startswith("rank 1 of 3: ") for error in found] == [True, False, True]
    assert all(text in str(error) for error in found)


def test_equal_models_and_data_are_no_error():
    x, y = worlds.blobs()
    assert worlds.errors(3, lambda comm: worlds.dense_net().fit(x, y, verbose=0)) == [None] * 3


def test_one_rank_may_evaluate_alone_between_two_trainings():
    x, y = worlds.blobs()

    def work(comm, alone):
        model = worlds.dense_net()
        model.fit(x, y, batch_size=10, verbose=0)
        loss = None
        if alone and comm.rank == 0:
            with dt.comm.use(dt.comm.connect("local")):
                loss = model.evaluate(x, y)
        model.fit(x, y, batch_size=10, verbose=0)
        return loss, dt.state_digest(model)

    with_it, without = (threads.run(2, work, alone) for alone in (True, False))
    assert [digest for _, digest in with_it] == [digest for _, digest in without]
    assert np.isfinite(with_it[0][0])


def test_a_step_exchanges_no_texts():
    x, y = worlds.blobs()

    def train(comm):
        model = worlds.dense_net()
        for _ in range(5):  # the plan is compared as well, once
            model.train_on_batch(x, y)
        exchanged, exchange = [], comm._exchanged
        comm._exchanged = lambda *args: exchanged.append(args) or exchange(*args)
        for _ in range(3):
            model.train_on_batch(x, y)
        of_steps = len(exchanged)
        comm.all_gather_json(None)
        return of_steps, len(exchanged)

    assert threads.run(2, train) == [(0, 1), (0, 1)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("place", [0, 19])
def test_a_batch_that_differs_in_a_sample_is_named(world_size, place):
    x, y = worlds.blobs(samples=20)

    def train(comm):
        mine = x.copy()
        mine[place, 1] += comm.rank == world_size - 1
        worlds.dense_net().train_on_batch(mine, y)

    kind, message = worlds.agreed(world_size, train)
    assert kind is CommError
    assert "the batch differs between ranks: rank 0 has ['x', 'float64', [20, 4]" in message
    assert f"rank {world_size - 1} has ['x', 'float64', [20, 4]" in message
