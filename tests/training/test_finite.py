"""A number that is not finite changes no weight and is traced to its origin; the step raises, or is left out."""

import logging

import numpy as np
import pytest

import disttrain as dt
from disttrain.autodiff import ops
from disttrain.comm import threads
from disttrain.errors import ConfigError, NonFiniteError
from disttrain.training.finite import MOST_SKIPPED, is_finite
from tests.training import worlds

pytestmark = pytest.mark.timeout(60)

X, Y = worlds.blobs(24)

# what sums gradients in a way of its own
WAYS = {
    "plain": {},
    "accumulating": {"optimizer": lambda: dt.optimizers.Adam(gradient_accumulation_steps=2)},
    "zero": {"distribution": dt.DataParallel(shard_optimizer=True)},
    "local steps": {"distribution": dt.DataParallel(local_steps=2)},
    "int8": {"distribution": dt.DataParallel(compression="int8")},
    "shards": {"shards": 8},
    "shards, accumulating": {"shards": 8, "optimizer": lambda: dt.optimizers.Adam(gradient_accumulation_steps=2)},
}


class SteepAtZero(dt.layers.Layer):
    """The root of the absolute value: finite at 0, its slope there is not."""

    def call(self, x):
        return ops.sqrt(ops.abs(x))


class Overflows(dt.layers.Layer):
    """Turns a sample whose inputs are large into infinite numbers."""

    def call(self, x):
        return x * 1e30 * 1e30


def compiled(layers, on_nonfinite="raise", *, optimizer=dt.optimizers.Adam, distribution=None, shards=None):
    model = dt.Sequential(
        [dt.layers.Dense(6, input_shape=(4,), name="first"), *layers, dt.layers.Dense(3, name="last")]
    )
    loss = dt.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer(), loss, ["accuracy"], distribution=distribution, on_nonfinite=on_nonfinite)
    return model


def fit(model, x=X, **kwargs):
    with np.errstate(all="ignore"):  # the numbers are bad on purpose
        return model.fit(x, Y, batch_size=8, shuffle=False, verbose=0, **kwargs)


def bad_sample(number):
    x = X.copy()
    x[number, 2] = np.nan
    return x


def message(world_size, layers, x=X, **kwargs):
    kind, text = worlds.agreed(world_size, lambda comm: fit(compiled(layers()), x, **kwargs))
    assert kind is NonFiniteError
    return text


@pytest.mark.parametrize("shards", [None, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_sample_is_named(world_size, shards):
    text = message(world_size, list, bad_sample(15), shards=shards)
    assert text.startswith("the loss is not finite at step 1 (counted from 0 over all epochs) on rank ")
    assert f"rank {world_size - 1} met it first in x of sample 15 (nan at [2], and so in 1 of 4 numbers)" in text


@pytest.mark.parametrize("shards", [None, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_layer_is_named(world_size, shards):
    text = message(world_size, lambda: [Overflows(name="culprit"), dt.layers.Activation("relu")], shards=shards)
    assert "at step 0" in text
    assert "rank 0 met it first in the output of layer 'culprit' (" in text


class Squares(dt.layers.Layer):
    def call(self, x):
        return x * x


def test_the_layer_is_named_where_a_plan_has_taken_over():
    def work(comm):
        model = compiled([Squares(name="culprit")])
        for _ in range(4):
            model.train_on_batch(X, Y)
        with np.errstate(all="ignore"):
            model.train_on_batch(X * 1e30, Y)

    kind, text = worlds.agreed(2, work)
    assert kind is NonFiniteError
    assert "met it first in the output of layer 'culprit'" in text


def test_nothing_of_a_step_that_was_left_out_stays_in_any_shards_gradients():
    def work(comm):
        model = compiled([], "skip")
        model._cut_into(8)
        with np.errstate(all="ignore"):
            model.train_on_batch(np.full_like(X, np.nan), Y)
        gradients = model._replica_among(comm).gradients
        return all((part == 0).all() for weight in model.weights for part in gradients.parts(weight))

    assert worlds.alone(work)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_gradient_is_named_though_the_loss_is_finite_and_no_weight_has_changed(world_size, way):
    settings = dict(WAYS[way])
    shards = settings.pop("shards", None)
    x = X.copy()
    x[1] = 0  # with the first step's bias the first layer's output is 0, where the root is steep

    def work(comm):
        model = compiled([SteepAtZero()], **settings)
        with pytest.raises(NonFiniteError) as caught:
            fit(model, x, shards=shards)
        return str(caught.value), all(np.isfinite(w.data).all() for w in model.weights)

    for text, weights_are_finite in threads.run(world_size, work):
        assert weights_are_finite
        assert text.startswith("the gradients are not finite at step 0 ")
        assert " met it first in the gradient of 'first/" in text


def test_a_sum_that_overflows_on_its_way_is_told_from_gradients_that_do():
    def work(comm):
        model = dt.Sequential([dt.layers.Dense(1, input_shape=(4,))])
        model.compile("sgd", "mse", distribution=dt.DataParallel(compression="float16"))
        fit(model, 1e3 * X)

    kind, text = worlds.agreed(2, work)
    assert kind is NonFiniteError
    assert "each rank's own numbers are finite, their sum over the ranks, as it travels, is not" in text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_that_is_left_out_changes_nothing_but_the_count(world_size, way):
    settings = dict(WAYS[way])
    shards = settings.pop("shards", None)

    def work(comm):
        model = compiled([dt.layers.BatchNormalization(synchronized=False)], "skip", **settings)
        model._cut_into(shards)
        steps = []
        for number in range(6):
            before = dt.state_digest(model)
            x = bad_sample(3) if number in (2, 3) else X
            with np.errstate(all="ignore"):
                logs = model.train_on_batch(x, Y)
            steps.append((np.isnan(logs["loss"]), before == dt.state_digest(model)))
        return model.optimizer.steps, steps, all(np.isfinite(w.data).all() for w in model.trainable_weights)

    for count, steps, is_finite_still in threads.run(world_size, work):
        assert count == 6
        assert is_finite_still
        assert [is_bad for is_bad, _ in steps] == [False, False, True, True, False, False]
        assert steps[2][1]
        assert steps[3][1]
        assert not steps[5][1]


@pytest.mark.parametrize("shards", [None, 8])
def test_replicas_stay_the_same_and_the_epoch_counts_the_other_steps(shards, caplog):
    def work(comm):
        model = compiled([], "skip")
        history = fit(model, bad_sample(15), epochs=2, shards=shards)
        return dt.state_digest(model), history.history["loss"]

    with caplog.at_level(logging.WARNING):
        results = threads.run(3, work)
    assert len({digest for digest, _ in results}) == 1
    assert np.isfinite(results[0][1]).all()
    told = [record.message for record in caplog.records if "left out" in record.message]
    assert len(told) == 2  # by rank 0, once an epoch
    assert all("x of sample 15" in each and each.endswith("the step is left out") for each in told)


def test_a_model_that_has_diverged_is_not_skipped_for_ever():
    x = np.full_like(X, np.nan)
    model = compiled([], "skip")
    with pytest.raises(NonFiniteError, match=f"at step {MOST_SKIPPED} .* the {MOST_SKIPPED + 1} steps up to it"):
        worlds.alone(lambda comm: fit(model, x, epochs=20))


class Counts(dt.layers.Layer):
    calls = 0

    def call(self, x):
        self.calls += 1
        return x * 1


def test_plans_go_on_after_a_step_that_was_left_out():
    def work(comm):
        counts = Counts()
        model = compiled([counts], "skip")
        for x in (X[:8], X[:8], X[:8], bad_sample(5)[:8], X[:8]):
            with np.errstate(all="ignore"):
                model.train_on_batch(x, Y[:8])
        before = counts.calls
        model.train_on_batch(X[:8], Y[:8])
        return counts.calls - before

    assert worlds.alone(work) == 0


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.ones(3, np.float32), True),
        (np.full(3, 1e30, np.float32), True),  # their squares are infinite
        (np.array([1, np.inf, 1]), False),
        (np.array([[1, np.nan]], np.float32), False),
        (np.array([60000, 60000], np.float16), True),
        (np.array([], np.float32), True),
        (np.array(np.nan), False),
    ],
)
def test_is_finite(array, expected):
    assert is_finite(array) is expected


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="on_nonfinite is 'raise' or 'skip', not 'ignore'"):
        compiled([], "ignore")
