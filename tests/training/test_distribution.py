"""DataParallel: accumulated gradients, local steps, sharded optimizers, compression; among ranks in threads."""

import contextlib
import functools

import numpy as np
import pytest

import disttrain as dt
from disttrain.comm import threads
from disttrain.errors import CheckpointError, CommError, ConfigError, NonFiniteError
from tests.comm import claims
from tests.training import worlds

pytestmark = pytest.mark.timeout(120)

SAMPLES, BATCH = 44, 8  # six steps an epoch, the last of half a batch


def model_of(optimizer, distribution=None, metrics=("accuracy",)):
    """Return a compiled classifier of `worlds.blobs`; `optimizer` is a name, or makes one: ranks do not share it."""
    model = dt.Sequential(
        [
            dt.layers.Dense(7, activation="tanh", input_shape=(4,)),
            dt.layers.Dropout(0.2),
            dt.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(
        optimizer() if callable(optimizer) else optimizer,
        "sparse_categorical_crossentropy",
        list(metrics),
        distribution=distribution,
    )
    return model


def fit(optimizer, distribution=None, *, epochs=3, callbacks=(), batch=BATCH):
    """Return the history, the weights and the model."""
    model = model_of(optimizer, distribution)
    history = model.fit(*worlds.blobs(SAMPLES), batch, epochs, verbose=0, callbacks=callbacks)
    return history.history, worlds.weights(model), model


def on(world_size, *args, **options):
    """Return the history and weights that all ranks agree on, to the bit."""
    results = threads.run(world_size, lambda comm: fit(*args, **options))
    for history, weights, _ in results[1:]:
        assert history == results[0][0]
        worlds.assert_equal(weights, results[0][1])
    return results[0]


OPTIMIZERS = {"sgd": dt.optimizers.SGD, "adam": dt.optimizers.Adam, "adamw": dt.optimizers.AdamW}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def optimizer(name, **options):
    """Return what makes an optimizer."""
    numbers = (0.1, 0.9) if name == "sgd" else (0.01,)
    return functools.partial(OPTIMIZERS[name], *numbers, **options)


# Gradient accumulation


@each_optimizer
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_accumulated_steps_are_those_of_one_worker(name, world_size, float64):
    ours, theirs = (
        on(ranks, optimizer(name, gradient_accumulation_steps=4), epochs=2) for ranks in (world_size, 1)
    )  # 12 steps: 3 updates
    assert ours[2].optimizer.iterations == 3
    # as in test_any_number_of_workers: float64 sums in another order
    np.testing.assert_allclose(ours[0]["loss"], theirs[0]["loss"], rtol=1e-10)
    worlds.assert_close(ours[1], theirs[1], 1e-10)


def test_accumulation_of_equal_batches_is_a_step_on_all_of_them(float64):
    x, y = worlds.blobs(32)

    def train(batch, **options):
        model = worlds.dense_net(dt.optimizers.Adam(0.01, **options))
        model.fit(x, y, batch, 2, verbose=0, shuffle=False)
        return worlds.weights(model)

    small, large = worlds.alone(lambda comm: (train(8, gradient_accumulation_steps=4), train(32)))
    worlds.assert_close(small, large, 1e-10)


def test_only_the_last_of_accumulated_steps_sends_gradients():
    def work(comm):
        model = model_of(optimizer("sgd", gradient_accumulation_steps=3), dt.DataParallel(bucket_bytes=1 << 22))
        x, y = worlds.blobs(BATCH)
        sent = []
        for _ in range(9):  # eager ones, and some that are replayed
            before = comm.bytes_sent
            model.train_on_batch(x, y)
            sent.append(comm.bytes_sent - before)
        return sent

    for sent in threads.run(2, work):
        quiet = [sent[i] for i in (4, 6, 7)]  # the first step sends the weights
        assert len(set(quiet)) == 1
        parameters = 16 * (2 + 1 + 2 + 1)  # each padded to 64 bytes: (4, 7), (7,), (7, 3), (3,)
        # half of the gradients to the other rank, half of the sums: all bytes once
        assert sent[5] - quiet[0] == sent[8] - quiet[0]
        assert sent[8] - quiet[0] == pytest.approx(parameters * 4, abs=64 * 4)


@pytest.mark.parametrize("sharded", [False, True])
def test_accumulation_is_reproducible_and_so_is_a_sharded_optimizer(sharded, tmp_path):
    """The same bits on any number of workers, also of a run that goes on in the middle of an accumulation."""

    def work(comm):
        distribution = dt.DataParallel(shard_optimizer=sharded, bucket_bytes=100)
        digests = []
        for steps in (11, None):
            model = model_of(optimizer("adam", gradient_accumulation_steps=4), distribution)
            callbacks = [Interrupt(steps), dt.callbacks.BackupAndRestore(comm.broadcast_json(place()), save_freq=5)]
            with contextlib.suppress(KeyError):
                model.fit(*worlds.blobs(SAMPLES), BATCH, 3, verbose=0, callbacks=callbacks, shards=4)
            digests.append((dt.state_digest(model), model.optimizer.steps))
        return digests

    alone = None
    for world_size in (1, 2, 3):
        directory = str(tmp_path / str(world_size))
        place = functools.partial(str, directory)
        results = threads.run(world_size, work)
        alone = alone or results[0]
        assert all(result == alone for result in results)
    assert alone[1][1] == 18


def test_reproducible_accumulation_is_accumulation(float64):
    def work(comm, **options):
        model = model_of(optimizer("adam", gradient_accumulation_steps=4))
        model.fit(*worlds.blobs(SAMPLES), BATCH, 2, verbose=0, **options)
        return worlds.weights(model)

    worlds.assert_close(threads.run(2, work, shards=4)[0], worlds.alone(work), 1e-10)


@pytest.mark.parametrize("options", [{"compression": "int8"}, {"local_steps": 2}])
def test_what_depends_on_the_number_of_workers_is_not_reproducible(options):
    def work(comm):
        with pytest.raises(ConfigError, match="weights depend on the number of workers"):
            model_of("sgd", dt.DataParallel(**options)).fit(*worlds.blobs(), 8, verbose=0, reproducible=True)

    threads.run(2, work)


# Local steps


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_one_local_step_of_plain_sgd_is_a_synchronous_one(world_size, float64):
    """The mean of ``w - rate * p * g_r`` is ``w - rate * sum(g_r)``, whatever parts ranks have of a batch."""
    local = dt.DataParallel(local_steps=2)  # one step, and the end of the epoch
    ours, theirs = (
        on(ranks, functools.partial(dt.optimizers.SGD, 0.1), local, epochs=1, batch=SAMPLES)
        for ranks in (world_size, 1)
    )
    worlds.assert_close(ours[1], theirs[1], 1e-10)


def test_local_steps_are_those_of_each_worker_alone_and_their_mean(float64):
    """Two ranks with two local steps, beside two models that never heard of each other."""
    x, y = worlds.blobs(16)

    def work(comm):
        model = worlds.dense_net(dt.optimizers.SGD(0.1, 0.9))
        model.compile(model.optimizer, model._loss, distribution=dt.DataParallel(local_steps=2))
        model.fit(x, y, 8, 2, verbose=0, shuffle=False)
        return worlds.weights(model)

    def alone(comm):
        models = [worlds.dense_net(dt.optimizers.SGD(0.1, 0.9)) for _ in range(2)]
        for _ in range(2):
            for step in range(2):
                for rank, model in enumerate(models):
                    part = slice(8 * step + 4 * rank, 8 * step + 4 * rank + 4)
                    model.train_on_batch(x[part], y[part])
            # after an epoch of two steps weights and slots are the mean
            for ours, theirs in zip(models[0].weights, models[1].weights, strict=True):
                ours.data[...] = theirs.data[...] = (ours.data + theirs.data) / 2
            for ours, theirs in zip(models[0].optimizer.slots, models[1].optimizer.slots, strict=True):
                for name, slot in ours.items():
                    slot[...] = theirs[name][...] = (slot + theirs[name]) / 2
        return worlds.weights(models[0])

    expected = worlds.alone(alone)
    for weights in threads.run(2, work):
        worlds.assert_close(weights, expected, 1e-10)


def test_local_steps_send_weights_once_in_a_while():
    def work(comm):
        model = model_of("sgd", dt.DataParallel(local_steps=3))
        x, y = worlds.blobs(BATCH)
        sent, digests, agree = [], [], []
        for _ in range(9):
            before = comm.bytes_sent
            model.train_on_batch(x, y)
            sent.append(comm.bytes_sent - before)
            digests.append(comm.all_gather_json(dt.state_digest(model)))
            agree.append(model._replicas[comm].update.agrees)
        return sent, digests, agree

    for sent, digests, agree in threads.run(2, work):
        assert sent[4] == sent[6] == sent[7] < sent[5] == sent[8]
        assert [len(set(of_all)) for of_all in digests] == [2, 2, 1] * 3
        assert agree == [False, False, True] * 3


@pytest.mark.parametrize("compression", [None, "bfloat16", "int8", "topk", "powersgd"])
def test_after_an_epoch_an_evaluation_and_a_checkpoint_replicas_are_the_same(compression, tmp_path):
    def work(comm):
        model = model_of("adam", dt.DataParallel(local_steps=4, compression=compression))
        x, y = worlds.blobs(SAMPLES)
        model.fit(x, y, BATCH, 1, verbose=0)
        digests = [dt.state_digest(model)]
        for act in (lambda: model.evaluate(x, y), lambda: model.save(comm.broadcast_json(str(tmp_path)))):
            model.train_on_batch(x[:BATCH], y[:BATCH])
            act()
            digests.append(dt.state_digest(model))
        saved = dt.load_model(tmp_path)
        return digests, dt.state_digest(saved), saved._distribution

    results = threads.run(3, work)
    assert all(result == results[0] for result in results)
    digests, loaded, distribution = results[0]
    assert loaded == digests[-1]
    assert distribution.local_steps == 4


def test_at_the_end_of_an_epoch_replicas_are_the_same():
    class Digests(dt.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            self.model.digests = [*getattr(self.model, "digests", ()), dt.state_digest(self.model)]

    def work(comm):
        _, _, model = fit("adam", dt.DataParallel(local_steps=4), callbacks=[Digests()])
        return model.digests

    results = threads.run(2, work)
    assert len(set(results[0])) == 3
    assert results[0] == results[1]


def test_weights_that_are_evaluated_are_the_exact_mean_whatever_travels_before():
    """A step of Adam moves each weight by about 0.01; int8 would round that by up to 0.01 / 254, the mean by 2**-24."""

    def work(comm):
        model = model_of(optimizer("adam"), dt.DataParallel(local_steps=10, compression="int8"))
        for _ in range(2):
            model.train_on_batch(*worlds.blobs(BATCH))
        own = np.concatenate([w.data.ravel() for w in model.weights])
        model.evaluate(*worlds.blobs(BATCH))
        return own, np.concatenate([w.data.ravel() for w in model.weights])

    own, mean = (np.stack(each) for each in zip(*threads.run(2, work), strict=True))
    assert np.abs(own[0] - own[1]).max() > 1e-3
    np.testing.assert_allclose(mean, np.broadcast_to(own.mean(axis=0), mean.shape), rtol=0, atol=4 * 2.0**-24)


def test_loss_and_metrics_of_local_steps_are_global():
    """In the first step all ranks still have the same weights."""

    def work(comm):
        model = model_of("sgd", dt.DataParallel(local_steps=3) if comm.world_size > 1 else None)
        return model.train_on_batch(*worlds.blobs(BATCH))

    alone = worlds.alone(work)
    for logs in threads.run(3, work):
        assert logs == pytest.approx(alone, rel=1e-6)


# A sharded optimizer


@each_optimizer
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 22])
@pytest.mark.parametrize("costs", [claims.LONG, claims.SHORT], ids=["ring", "doubling"])
def test_a_sharded_optimizer_gives_the_bits_of_a_whole_one(name, world_size, bucket_bytes, costs):
    def work(comm):
        results = []
        with claims.messages_cost(comm, costs):
            for sharded in (True, False):
                distribution = dt.DataParallel(shard_optimizer=sharded, bucket_bytes=bucket_bytes)
                results.append(fit(optimizer(name), distribution)[:2])
        return results

    for ours, theirs in threads.run(world_size, work):
        assert ours[0] == theirs[0]
        worlds.assert_equal(ours[1], theirs[1])


def test_each_rank_holds_its_part_of_the_slots():
    def work(comm):
        _, _, model = fit("adam", dt.DataParallel(shard_optimizer=True), epochs=1)
        return sum(slot.nbytes for slots in model.optimizer.slots for slot in slots.values())

    parts = threads.run(4, work)
    whole = worlds.alone(
        lambda comm: sum(s.nbytes for d in fit("adam", epochs=1)[2].optimizer.slots for s in d.values())
    )
    assert sum(parts) == whole
    assert max(parts) - min(parts) <= 2 * 4  # an element, of each of two slots


def test_what_a_sharded_optimizer_sends_is_no_more_than_sums_would_be():
    def work(comm):
        sent = []
        for distribution in (None, dt.DataParallel(shard_optimizer=True)):
            model = model_of("sgd", distribution)
            x, y = worlds.blobs(BATCH)
            for _ in range(2):
                before = comm.bytes_sent
                with claims.messages_cost(comm, claims.LONG):
                    model.train_on_batch(x, y)
            sent.append(comm.bytes_sent - before)
        return comm.all_gather_json(sent)

    whole, sharded = np.sum(threads.run(3, work)[0], axis=0)
    assert whole == sharded


@pytest.mark.parametrize("steps", [None, 3])
def test_a_sharded_checkpoint_is_free_of_the_number_of_ranks(tmp_path, steps):
    """Saved by 3 ranks, sharded; gone on from by 2, 1 and 3, sharded and whole."""
    sharded = dt.DataParallel(shard_optimizer=True)

    def save(comm):
        _, _, model = fit(lambda: dt.optimizers.Adam(gradient_accumulation_steps=steps), sharded, epochs=1)
        model.train_on_batch(*worlds.blobs(BATCH))
        model.save(tmp_path)
        model.train_on_batch(*worlds.blobs(BATCH))
        return worlds.weights(model)

    def go_on(comm, distribution):
        model = model_of(dt.optimizers.Adam(gradient_accumulation_steps=steps), distribution)
        model.load(tmp_path)
        model.train_on_batch(*worlds.blobs(BATCH))
        return worlds.weights(model)

    expected = threads.run(3, save)[0]
    worlds.assert_equal(threads.run(3, go_on, sharded)[0], expected)
    for world_size, distribution in ((1, sharded), (2, sharded), (2, None), (1, None)):
        for weights in threads.run(world_size, go_on, distribution):
            worlds.assert_close(weights, expected, 1e-5)  # float32 sums in another order, through Adam's root


class Clipped(dt.optimizers.SGD):
    """Clips by the norm of all gradients."""

    def apply(self, grads, variables):
        norm = np.sqrt(sum(np.vdot(g, g) for g in grads))
        super().apply([g / max(norm, 1) for g in grads], variables)


@pytest.mark.parametrize("options", [{"shard_optimizer": True}, {"steps": 2}])
def test_an_optimizer_that_looks_at_all_gradients_is_refused_where_it_would_not_see_them(options):
    steps = options.pop("steps", None)

    class Optimizer(Clipped):
        def __init__(self):
            super().__init__(gradient_accumulation_steps=steps)

    def work(comm):
        with pytest.raises(ConfigError, match=r"element by element, and Optimizer has an apply\(\) of its own"):
            fit(Optimizer, dt.DataParallel(**options))

    threads.run(2, work)


def test_an_optimizer_with_an_apply_of_its_own_serves_otherwise():
    on(2, Clipped)


# Compression


@pytest.mark.parametrize("compression", ["float16", "bfloat16", "int8", "powersgd", "topk", dt.compression.TopK(0.1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_replicas_stay_the_same_whatever_travels(compression, world_size):
    on(world_size, "adam", dt.DataParallel(compression=compression, bucket_bytes=100))


@pytest.mark.parametrize("compression", ["int8", "topk", "powersgd"])
def test_gradients_that_are_not_finite_are_not_remembered(compression):
    def work(comm):
        model = model_of("sgd", dt.DataParallel(compression=compression))
        x, y = worlds.blobs(BATCH)
        before = worlds.weights(model)
        with pytest.raises(NonFiniteError):
            model.train_on_batch(np.where(np.arange(BATCH)[:, None] == 0, np.nan, x), y)
        worlds.assert_equal(worlds.weights(model), before)
        model.train_on_batch(x, y)
        return all(np.isfinite(w.data).all() for w in model.weights)

    assert threads.run(2, work) == [True, True]


def test_ranks_that_were_told_different_things_are_told_so():
    error, message = worlds.agreed(
        2, lambda comm: fit("sgd", dt.DataParallel(compression="int8" if comm.rank else None))
    )
    assert error is CommError
    assert message.startswith("what compile() was given differs between ranks: rank 0 has")


# Going on


class Interrupt(dt.callbacks.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, batch, logs):
        if self.model.optimizer.steps == self.step:
            raise KeyError(self.step)


DISTRIBUTIONS = {
    "accumulated": ({"gradient_accumulation_steps": 4}, {}),
    "local": ({}, {"local_steps": 4}),
    "local, accumulated": ({"gradient_accumulation_steps": 2}, {"local_steps": 2}),
    "local, int8": ({}, {"local_steps": 2, "compression": "int8"}),
    "sharded, accumulated": ({"gradient_accumulation_steps": 4}, {"shard_optimizer": True}),
    "int8": ({}, {"compression": "int8"}),
    "powersgd, accumulated": ({"gradient_accumulation_steps": 2}, {"compression": "powersgd", "bucket_bytes": 1}),
    "topk": ({}, {"compression": "topk"}),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_resumed_run_ends_with_the_bits_of_one_that_saved_as_it_did(kind, step, tmp_path):
    for_optimizer, for_ranks = DISTRIBUTIONS[kind]

    def run(comm, directory, interrupt):
        callbacks = [Interrupt(interrupt), dt.callbacks.BackupAndRestore(directory, save_freq=1)]
        return fit(optimizer("adam", **for_optimizer), dt.DataParallel(**for_ranks), epochs=2, callbacks=callbacks)[:2]

    def interrupted(comm):
        with pytest.raises(KeyError):
            run(comm, tmp_path / "interrupted", step)
        comm.barrier()
        return run(comm, tmp_path / "interrupted", None)

    resumed = threads.run(2, interrupted)
    whole = threads.run(2, run, tmp_path / "whole", None)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours[0] == theirs[0]
        worlds.assert_equal(ours[1], theirs[1])


@pytest.mark.parametrize("kind", ["accumulated", "int8", "topk", "sharded, accumulated", "local, accumulated"])
def test_what_was_kept_goes_on_on_any_number_of_ranks(kind, tmp_path, float64):
    """Without compression from then on, all that was kept is in the next update, whoever makes it."""
    for_optimizer, for_ranks = DISTRIBUTIONS[kind]

    def save(comm):
        model = model_of(dt.optimizers.SGD(0.1, **for_optimizer), dt.DataParallel(**for_ranks))
        for step in range(5):
            x, y = worlds.blobs(BATCH + step)
            model.train_on_batch(x, y)
        model.save(tmp_path)

    def go_on(comm):
        model = model_of(dt.optimizers.SGD(0.1, **for_optimizer))
        model.load(tmp_path)
        for _ in range(4):
            model.train_on_batch(*worlds.blobs(BATCH))
        return worlds.weights(model)

    threads.run(3, save)
    alone = worlds.alone(go_on)
    for world_size in (2, 3):
        for weights in threads.run(world_size, go_on):
            worlds.assert_close(weights, alone, 1e-10)


def test_a_part_of_an_accumulation_needs_one_to_go_on_in(tmp_path):
    def work(comm):
        model = model_of(dt.optimizers.SGD(gradient_accumulation_steps=4))
        for _ in range(3):
            model.train_on_batch(*worlds.blobs(BATCH))
        model.save(tmp_path)
        other = model_of(dt.optimizers.SGD(gradient_accumulation_steps=2))
        with pytest.raises(CheckpointError, match="of 3 steps that are no update yet"):
            other.load(tmp_path)

    worlds.alone(work)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "bfloat"}, "did you mean 'bfloat16'"),
        ({"compression": 8}, "a name or a Compression, not 8"),
        ({"local_steps": 0}, "local_steps must be an integer of at least 1, not 0"),
        ({"local_steps": True}, "local_steps must be"),
        ({"bucket_bytes": 1.5}, "bucket_bytes must be an integer of at least 1, not 1.5"),
        ({"shard_optimizer": 1}, "shard_optimizer is True or False, not 1"),
        ({"shard_optimizer": True, "local_steps": 2}, "choose one"),
        ({"shard_optimizer": True, "compression": "int8"}, "choose one"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        dt.DataParallel(**options)


@pytest.mark.parametrize("make", [lambda: dt.compression.TopK(0), lambda: dt.compression.PowerSGD(0)])
def test_settings_of_compression_are_checked(make):
    with pytest.raises(ConfigError, match="must be"):
        make()


def test_compile_takes_a_data_parallel():
    with pytest.raises(ConfigError, match="distribution is a DataParallel, not 'bfloat16'"):
        model_of("sgd", "bfloat16")


@pytest.mark.parametrize(
    "distribution",
    [
        dt.DataParallel(compression=dt.compression.PowerSGD(3)),
        dt.DataParallel(local_steps=5, bucket_bytes=77),
        dt.DataParallel(compression="int8"),
    ],
)
def test_a_loaded_model_is_distributed_as_it_was(distribution, tmp_path):
    worlds.alone(lambda comm: model_of("sgd", distribution).save(tmp_path))
    loaded = worlds.alone(lambda comm: dt.load_model(tmp_path))
    assert loaded._distribution.get_config() == distribution.get_config()
