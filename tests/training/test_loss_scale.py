"""LossScaleOptimizer: no bit changes where nothing is too large or too small; float16 carries what it would lose."""

import logging

import numpy as np
import pytest

import disttrain as dt
from disttrain.autodiff import ops
from disttrain.comm import threads
from disttrain.errors import CheckpointError, CommError, ConfigError, NonFiniteError
from disttrain.optimizers import SGD, Adam, LossScaleOptimizer
from tests.training import worlds

pytestmark = pytest.mark.timeout(60)

X, Y = worlds.blobs(24)

# what sums gradients in a way of its own
WAYS = {
    "plain": {},
    "eager": {"static": False},
    "accumulating": {"accumulated": 3},
    "zero": {"shard_optimizer": True},
    "zero, accumulating": {"shard_optimizer": True, "accumulated": 3},
    "local steps": {"local_steps": 2},
    "local steps, int8": {"local_steps": 2, "compression": "int8"},
    "int8": {"compression": "int8"},
    "int8, accumulating": {"compression": "int8", "accumulated": 3},
    "topk": {"compression": dt.compression.TopK(0.1)},
    "powersgd": {"compression": "powersgd"},
    "shards": {"shards": 8},
    "shards, accumulating": {"shards": 8, "accumulated": 3},
}


def compiled(scaled, *, accumulated=None, static="auto", layers=(), on_nonfinite="raise", **distribution):
    """Return a classifier of `worlds.blobs`; `scaled` are arguments of a LossScaleOptimizer, None for none."""
    model = dt.Sequential(
        [dt.layers.Dense(6, activation="tanh", input_shape=(4,)), *layers, dt.layers.Dense(3, name="last")]
    )
    optimizer = Adam(0.01, gradient_accumulation_steps=accumulated)
    loss = dt.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        optimizer if scaled is None else LossScaleOptimizer(optimizer, **scaled),
        loss,
        ["accuracy"],
        static=static,
        distribution=dt.DataParallel(**distribution),
        on_nonfinite=on_nonfinite,
    )
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_without_overflow_no_bit_is_changed_while_the_scale_grows(world_size, way):
    settings = dict(WAYS[way])
    shards = settings.pop("shards", None)

    def train(scaled):
        model = compiled(scaled, **settings)
        history = model.fit(X, Y, batch_size=8, epochs=4, shards=shards, verbose=0).history
        return dt.state_digest(model), history, model.optimizer

    def work(comm):
        return train(None), train({"initial_scale": 2.0**4, "dynamic_growth_steps": 2})

    for (digest, history, _), (its_digest, its_history, optimizer) in threads.run(world_size, work):
        assert its_history == history
        assert its_digest == digest
        assert (optimizer.steps, optimizer.dynamic_scale) == (12, 2.0**10)  # 12 steps, doubled after each 2


class Counts(dt.layers.Layer):
    calls = 0

    def call(self, x):
        self.calls += 1
        return x * 1


def test_a_plan_reads_the_scale_of_each_step():
    def work(comm):
        counts = Counts()
        model = compiled({"dynamic_growth_steps": 1}, layers=[counts])
        scales = []
        for _ in range(3):
            model.train_on_batch(X, Y)
        eager = counts.calls
        for _ in range(3):
            scales.append(float(model._replica_among(comm).gradients._factor))
            model.train_on_batch(X, Y)
        return scales, counts.calls - eager

    scales, calls = worlds.alone(work)
    assert calls == 0
    assert scales == [2.0**17, 2.0**18, 2.0**19]  # as the step before has used them


# float16 on the way


def line(x, y, optimizer, compression="float16"):
    """Return the weight of a line through 0 after 30 steps on all samples, its changes, and the last loss."""
    model = dt.Sequential([dt.layers.Dense(1, use_bias=False, kernel_initializer="ones", input_shape=(1,))])
    model.compile(optimizer, "mse", distribution=dt.DataParallel(compression=compression))
    losses = [model.train_on_batch(x, y)["loss"] for _ in range(30)]
    return model.weights[0].data.item(), losses[0], losses[-1], model.optimizer


SMALL = np.linspace(1e-5, 4e-5, 12, dtype=np.float32)[:, None]
LARGE = np.linspace(1e3, 4e3, 12, dtype=np.float32)[:, None]


def careful():
    return Adam(0.1, epsilon=1e-15)  # gradients are of the order of 1e-9


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_that_vanish_in_float16_train_nothing_and_scaled_ones_do(world_size):
    y = 3 * SMALL

    def work(comm):
        return [
            line(SMALL, y, careful()),
            line(SMALL, y, LossScaleOptimizer(careful(), initial_scale=2.0**24)),
            line(SMALL, y, careful(), compression=None),
        ]

    for vanished, scaled, exact in threads.run(world_size, work):
        assert vanished[:1] == (1.0,)
        assert vanished[1] == vanished[2]
        assert scaled[2] < 0.1 * scaled[1]
        # each gradient is rounded twice to 11 bits, which changes a step of Adam's by 2**-10 of it at most, in effect
        # no more than 30 of them in all
        assert scaled[0] == pytest.approx(exact[0], abs=30 * 0.1 * 2**-10)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_that_overflow_in_float16_are_an_error_and_scaled_ones_train(world_size):
    y = 3 * LARGE  # gradients are about -3e7

    def work(comm):
        with pytest.raises(NonFiniteError, match="each rank's own numbers are finite, their sum over the ranks"):
            line(LARGE, y, Adam(0.1))
        return line(LARGE, y, LossScaleOptimizer(Adam(0.1), initial_scale=1.0))

    for weight, first, last, optimizer in threads.run(world_size, work):
        assert weight > 2
        assert last < 0.3 * first
        # the least power of two by which -2 * mean(x * x) * 2 overflows is 2**-8 or so; ranks' parts are smaller
        assert 2.0**-14 < optimizer.dynamic_scale < 2.0**-7


# Steps that are left out


def sums(scaled, *, rate=0.01, accumulated=None, on_nonfinite="raise", **distribution):
    """Return a model whose gradient is the mean of the samples, which overflows where that times the scale does."""
    model = dt.Sequential([dt.layers.Dense(1, use_bias=False, name="only", input_shape=(2,))])
    optimizer = LossScaleOptimizer(SGD(rate, gradient_accumulation_steps=accumulated), **scaled)
    model.compile(
        optimizer,
        lambda y_true, y_pred: y_pred[:, 0],
        distribution=dt.DataParallel(**distribution),
        on_nonfinite=on_nonfinite,
    )
    return model


GENTLE = np.ones((24, 2), np.float32)
# float32 ends at 3.4e38: of one sample in 24, times 2**15 / 24, this is beyond, times 2**14 / 24 it is not
PEAK = GENTLE.copy()
PEAK[15] = 4e35
ZEROS = np.zeros((24, 1), np.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_where_one_rank_overflows_all_leave_the_step_out_and_halve_the_scale(world_size, way, caplog):
    settings = dict(WAYS[way])
    shards, _ = settings.pop("shards", None), settings.pop("static", None)

    def work(comm):
        model = sums({"dynamic_growth_steps": 100}, **settings)
        model._cut_into(shards)
        steps = []
        for number in range(12):
            before = dt.state_digest(model)
            with np.errstate(all="ignore"):
                logs = model.train_on_batch(PEAK if number in (2, 7) else GENTLE, ZEROS)
            steps.append((model.optimizer.dynamic_scale, before == dt.state_digest(model), np.isfinite(logs["loss"])))
        return steps, model.optimizer.steps, np.isfinite(model.weights[0].data).all()

    with caplog.at_level(logging.INFO):
        results = threads.run(world_size, work)
    for steps, count, is_finite in results:
        assert count == 12
        assert is_finite
        assert [scale for scale, _, _ in steps] == [2.0**15] * 2 + [2.0**14] * 10  # at 2**14 a peak is no overflow
        assert steps[2][1]
        assert not steps[5][1]
        assert all(each for _, _, each in steps)  # the loss of a step that is left out is counted: it is finite
    told = [record.message for record in caplog.records if "not finite" in record.message]
    assert told == ["step 2: gradients are not finite with the loss scale 32768, which halves"]


def test_the_scale_doubles_after_so_many_finite_steps_in_a_row():
    def work(comm):
        model = sums({"dynamic_growth_steps": 3})
        scales = []
        for number in range(12):
            scales.append(model.optimizer.dynamic_scale)
            with np.errstate(all="ignore"):
                model.train_on_batch(PEAK if number in (2, 3) else GENTLE, ZEROS)
        return scales

    # the peak at step 3 is finite, so that steps 3, 4 and 5 are three
    expected = [15, 15, 15, 14, 14, 14, 15, 15, 15, 16, 16, 16]
    assert worlds.alone(work) == [2.0**each for each in expected]


@pytest.mark.parametrize("shards", [None, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_that_no_scale_makes_finite_are_an_error_in_the_end(world_size, shards):
    class Steep(dt.layers.Layer):
        def call(self, x):
            return ops.sqrt(ops.abs(x))

    def infinite(comm):
        inner = dt.layers.Dense(2, kernel_initializer="zeros", name="first", input_shape=(2,))
        model = dt.Sequential([inner, Steep(), dt.layers.Dense(1, name="last")])
        model.compile(LossScaleOptimizer(SGD(), initial_scale=2.0**-11), "mse")
        model._cut_into(shards)
        before = dt.state_digest(model)
        with np.errstate(all="ignore"):
            for number in range(10):
                try:
                    model.train_on_batch(GENTLE, ZEROS)
                except NonFiniteError:
                    assert number == 3  # 2**-11, 2**-12 and 2**-13 were halved
                    assert dt.state_digest(model) == before
                    raise

    kind, text = worlds.agreed(world_size, infinite)
    assert kind is NonFiniteError
    assert text.startswith("the gradients are not finite at step 3 ")
    assert " met it first in the gradient of 'first/" in text
    assert "the loss scale is 6.10352e-05 and cannot be lowered any more; no weight was changed" in text


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale(world_size):
    x = GENTLE.copy()
    x[15, 1] = np.nan

    def raising(comm):
        sums({}).train_on_batch(x, ZEROS)

    kind, text = worlds.agreed(world_size, raising)
    assert kind is NonFiniteError
    assert "met it first in x of sample 15" in text
    assert "scale" not in text

    def skipping(comm):
        model = sums({}, on_nonfinite="skip")
        model.train_on_batch(x, ZEROS)
        model.train_on_batch(GENTLE, ZEROS)
        return model.optimizer.steps, model.optimizer.dynamic_scale

    assert threads.run(world_size, skipping) == [(2, 2.0**14)] * world_size


# Saved, and gone on from


class InterruptedError(Exception):  # noqa: A001
    pass


class Interrupt(dt.callbacks.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, batch, logs):
        if self.model.optimizer.steps == self.step:
            self.step = None
            raise InterruptedError


@pytest.mark.parametrize("step", [1, 4, 7])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (2, 1), (3, 2)])
@pytest.mark.parametrize("accumulated", [None, 2])
def test_a_run_goes_on_with_its_scale_and_count_on_any_number_of_ranks(tmp_path, before, after, step, accumulated):
    x = np.concatenate([PEAK, GENTLE, GENTLE])

    def fit(comm, interrupt):
        model = sums({"dynamic_growth_steps": 4}, rate=1e-37, accumulated=accumulated)
        callbacks = [interrupt, dt.callbacks.BackupAndRestore(tmp_path, save_freq=1)]
        with np.errstate(all="ignore"):
            model.fit(x, np.zeros((72, 1), np.float32), 24, 4, shards=8, shuffle=False, verbose=0, callbacks=callbacks)
        return dt.state_digest(model), model.optimizer.progress(), model.optimizer.steps

    def interrupted(comm):
        with pytest.raises(InterruptedError):
            fit(comm, Interrupt(step))

    threads.run(before, interrupted)
    ended = threads.run(after, lambda comm: fit(comm, Interrupt(None)))

    def undisturbed(comm):
        model = sums({"dynamic_growth_steps": 4}, rate=1e-37, accumulated=accumulated)
        with np.errstate(all="ignore"):
            model.fit(x, np.zeros((72, 1), np.float32), 24, 4, shards=8, shuffle=False, verbose=0)
        return dt.state_digest(model), model.optimizer.progress(), model.optimizer.steps

    assert ended == [worlds.alone(undisturbed)] * after


def test_a_saved_model_is_loaded_with_its_scale_and_one_without_goes_on_with_the_initial_one(tmp_path):
    def work(comm):
        model = compiled({"initial_scale": 4.0, "dynamic_growth_steps": 2})
        for _ in range(5):
            model.train_on_batch(X, Y)
        model.save(tmp_path / "scaled")
        again = dt.load_model(tmp_path / "scaled")
        assert isinstance(again.optimizer, LossScaleOptimizer)
        assert again.optimizer.get_config() == model.optimizer.get_config()
        assert again.optimizer.progress() == model.optimizer.progress() == {"loss_scale": [16.0, 1]}
        for each in (model, again):
            each.train_on_batch(X, Y)
        assert dt.state_digest(again) == dt.state_digest(model)
        assert again.optimizer.dynamic_scale == 32.0

        plain = compiled(None)
        plain.train_on_batch(X, Y)
        plain.save(tmp_path / "plain")
        model = compiled({"initial_scale": 4.0})
        model.load(tmp_path / "plain")
        assert model.optimizer.progress() == {"loss_scale": [4.0, 0]}
        plain.load(tmp_path / "scaled")
        assert plain.optimizer.steps == 5

    worlds.alone(work)


@pytest.mark.parametrize("state", [[3.0, 0], [2.0**-20, 0], ["4", 0], [4.0, 1.5], [4.0], 7])
def test_a_checkpoint_with_a_strange_scale_is_refused(state, tmp_path):
    def work(comm):
        model = compiled({})
        model.train_on_batch(X, Y)
        model.optimizer.progress = lambda: {"loss_scale": state}
        model.save(tmp_path)
        with pytest.raises(CheckpointError):
            dt.load_model(tmp_path)

    worlds.alone(work)


# A loop of one's own


def test_a_loop_of_ones_own_scales_the_loss_and_gives_the_gradients_of_that():
    scaled, plain = (dt.Tensor(np.array([1.0, 2.0], np.float32), requires_grad=True) for _ in range(2))
    ours = LossScaleOptimizer(Adam(0.1), dynamic_growth_steps=2)
    theirs = Adam(0.1)
    for _ in range(5):
        for weight, optimizer in ((scaled, ours), (plain, theirs)):
            weight.grad = None
            loss = (weight * weight * weight).sum()
            (optimizer.scale_loss(loss) if optimizer is ours else loss).backward()
            optimizer.apply([weight.grad], [weight])
    np.testing.assert_array_equal(scaled.data, plain.data)
    assert ours.dynamic_scale == 2.0**17
    before = scaled.data.copy()
    ours.apply([np.array([1.0, np.inf])], [scaled])
    np.testing.assert_array_equal(scaled.data, before)
    assert (ours.steps, ours.iterations, ours.dynamic_scale) == (6, 6, 2.0**16)
    assert ours.slots is ours.inner_optimizer.slots
    ours.learning_rate = 0.5
    assert ours.inner_optimizer.learning_rate == 0.5
    least = LossScaleOptimizer(SGD(), initial_scale=2.0**-14)
    with pytest.raises(NonFiniteError, match=r"step 0 .* the loss scale is 6\.10352e-05 and cannot be lowered"):
        least.apply([np.array([np.nan])], [np.ones(1)])


def test_gradients_of_float16_are_divided_in_float32():
    weight = np.zeros(1, np.float16)
    optimizer = LossScaleOptimizer(SGD(2.0**20))
    optimizer.apply([np.array([2.0**-10], np.float16)], [weight])  # 2**-25 in truth, which float16 has not
    assert weight == -(2.0**-5)


def test_an_apply_of_the_users_own_sees_gradients_without_the_scale():
    class Clipped(SGD):
        def apply(self, grads, variables):
            self.seen.append(max(float(abs(g).max()) for g in grads))
            super().apply([np.clip(g, -0.01, 0.01) for g in grads], variables)

    def work(comm):
        results = []
        for wrapped in (False, True):
            inner = Clipped(0.1)
            inner.seen = []
            model = worlds.dense_net(LossScaleOptimizer(inner) if wrapped else inner)
            for _ in range(4):
                model.train_on_batch(*worlds.blobs())
            results.append((inner.seen, dt.state_digest(model)))
        return results

    for plain, scaled in threads.run(2, work):
        assert plain == scaled


# What is refused


def test_ranks_with_other_scales_are_told_apart():
    def work(comm):
        compiled({"initial_scale": 2.0**comm.rank}).train_on_batch(X, Y)

    kind, text = worlds.agreed(2, work)
    assert kind is CommError
    assert "what compile() was given" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_optimizer": "adam"}, "inner_optimizer is an Optimizer without a loss scale, not 'adam'"),
        ({"inner_optimizer": LossScaleOptimizer(SGD())}, "inner_optimizer is an Optimizer without a loss scale"),
        ({"initial_scale": 3.0}, r"a power of two from 2\*\*-14 to 2\*\*127, not 3\.0"),
        ({"initial_scale": 2.0**-15}, "a power of two"),
        ({"initial_scale": float("inf")}, "a power of two"),
        ({"initial_scale": True}, "a power of two"),
        ({"dynamic_growth_steps": 0}, "dynamic_growth_steps must be an integer of at least 1, not 0"),
        ({"dynamic_growth_steps": 2.0}, "dynamic_growth_steps must be an integer of at least 1, not 2.0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LossScaleOptimizer(**{"inner_optimizer": SGD(), **options})


def test_the_scale_does_not_leave_the_range_of_float32():
    optimizer = LossScaleOptimizer(SGD(), initial_scale=2.0**126, dynamic_growth_steps=1)
    optimizer.steps = 5000
    assert optimizer.dynamic_scale == 2.0**127
