"""Training among processes, on as many ranks as the launcher has started, beside one worker inside the same process.

Every rank does the same, gathers what came out, and only then asserts.
"""

import numpy as np
import pytest

import disttrain as dt
from disttrain import backend
from disttrain.errors import CheckpointError, CommError, DataError, DisttrainError, NonFiniteError
from tests.comm import claims
from tests.training import worlds

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def _float64():
    floatx, seed = backend.floatx(), backend.seed()
    backend.set_floatx("float64")
    yield
    backend.set_floatx(floatx)
    backend.set_random_seed(seed)


@pytest.fixture
def shared(comm, tmp_path):
    """Return one directory for all ranks."""
    return comm.broadcast_json(str(tmp_path))


def train(*, optimizer="adam", batch_size=13, callbacks=()):
    """Return losses, metrics, weights' digest and predictions of a small convolutional net on digits."""
    x, y = worlds.digits(47)
    model = worlds.conv_net(optimizer, ["accuracy", "f1_score"])
    history = model.fit(
        x, y, batch_size, 2, verbose=0, callbacks=callbacks, validation_data=worlds.digits(9, start=100)
    )  # fmt: skip
    values = np.concatenate([np.ravel(course) for course in history.history.values()])
    return values, dt.state_digest(model), model.predict(x), model


def errors(comm, function):
    """Return class and message of what ``function()`` ends with on each rank; None where there is no error."""
    found = None
    try:
        function()
    except DisttrainError as error:
        found = [type(error).__name__, str(error)]
    return comm.all_gather_json(found)


@pytest.mark.parametrize(("optimizer", "batch_size"), [("adam", 13), ("adamw", 2), ("sgd", 47)])
def test_all_ranks_together_train_the_model_of_one_worker(comm, optimizer, batch_size):
    values, digest, predicted, model = train(optimizer=optimizer, batch_size=batch_size)
    with dt.comm.use(dt.comm.connect("local")):
        alone, _, predicted_alone, model_alone = train(optimizer=optimizer, batch_size=batch_size)
    weights, weights_alone = (np.concatenate([w.data.ravel() for w in m.weights]) for m in (model, model_alone))
    # as in tests/training/test_any_number_of_workers.py: float64 sums in another order
    claims.holds(
        comm,
        np.allclose(values, alone, rtol=1e-10, atol=1e-10),
        np.allclose(weights, weights_alone, rtol=1e-10, atol=1e-10),
        np.allclose(predicted, predicted_alone, rtol=1e-10, atol=1e-10),
        len(set(comm.all_gather_json(digest))) == 1,
        len({v.tobytes() for v in comm.all_gather(values)}) == 1,
    )


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (None, {"compression": "bfloat16"}),
        (None, {"compression": "int8", "local_steps": 2}),
        (None, {"compression": "powersgd"}),
        (3, {"compression": "topk"}),
        (3, {"shard_optimizer": True}),
    ],
)
def test_however_ranks_agree_they_end_with_one_model(comm, shared, steps, options):
    distribution = dt.DataParallel(bucket_bytes=1000, **options)
    x, y = worlds.digits(47)

    def again():
        model = worlds.conv_net(dt.optimizers.Adam(gradient_accumulation_steps=steps))
        model.compile(model.optimizer, "sparse_categorical_crossentropy", distribution=distribution)
        return model

    model = again()
    losses = model.fit(x, y, 13, 3, verbose=0).history["loss"]
    model.save(shared)
    loaded = again()
    loaded.load(shared)
    digests = [dt.state_digest(model), dt.state_digest(loaded)]
    for each in (model, loaded):
        each.fit(x, y, 13, 1, verbose=0)
        digests.append(dt.state_digest(each))
    claims.holds(
        comm,
        len({str(found) for found in comm.all_gather_json(digests)}) == 1,
        digests[0] == digests[1],
        digests[2] == digests[3],
        losses[-1] < losses[0],
    )


def test_the_weights_of_rank_0_are_everybody_s(comm):
    model = worlds.dense_net()
    of_rank_0 = worlds.weights(model)
    for weight in model.weights:
        weight.data += comm.rank
    model.evaluate(*worlds.blobs())
    claims.holds(comm, all(np.array_equal(w.data, of_rank_0[w.name]) for w in model.weights))


@pytest.mark.parametrize("who", ["all ranks", "the last rank"])
def test_labels_outside_the_classes_are_an_error_on_all_ranks(comm, who):
    x, y = worlds.blobs()
    last = comm.world_size - 1
    if who == "all ranks" or comm.rank == last:
        y[3] = 7
    found = errors(comm, lambda: worlds.dense_net().fit(x, y, verbose=0))
    assert [kind for kind, _ in found] == [DataError.__name__] * comm.world_size
    assert all("label 7 of sample 3 is outside the classes 0 to 2" in text for _, text in found)
    named = [text.startswith(f"rank {last} of {comm.world_size}: ") for _, text in found]
    assert named == [who == "the last rank" and rank != last for rank in range(comm.world_size)]


def test_a_nan_names_step_and_rank_on_all_ranks(comm):
    x, y = worlds.blobs(20)
    x[19] = np.nan  # the last of the batch: with the last rank
    model = worlds.dense_net()
    before = dt.state_digest(model)
    found = errors(comm, lambda: model.fit(x, y, batch_size=20, shuffle=False, verbose=0))
    after = comm.all_gather_json(dt.state_digest(model))
    assert [kind for kind, _ in found] == [NonFiniteError.__name__] * comm.world_size
    where = f"at step 0 (counted from 0 over all epochs) on rank {comm.world_size - 1} (nan) of {comm.world_size}"
    assert all(where in text for _, text in found)
    assert after == [before] * comm.world_size


@pytest.mark.parametrize("what", ["models", "data"])
def test_ranks_that_differ_are_told_on_all_ranks(comm, what):
    x, y = worlds.blobs()
    odd = comm.rank == comm.world_size - 1
    model = dt.Sequential([dt.layers.Dense(4 + (odd and what == "models"), input_shape=(4,)), dt.layers.Dense(3)])
    model.compile("sgd", dt.losses.SparseCategoricalCrossentropy(from_logits=True))
    if odd and what == "data":
        x = x[::-1]
    found = errors(comm, lambda: model.fit(x, y, verbose=0))
    if comm.world_size == 1:
        assert found == [None]
        return
    assert [kind for kind, _ in found] == [CommError.__name__] * comm.world_size
    text = f"rank {comm.world_size - 1} has ['{'dense/kernel' if what == 'models' else 'x'}', "
    assert all(text in message for _, message in found)


class InterruptedError(Exception):  # noqa: A001
    pass


class Interrupt(dt.callbacks.Callback):
    """Raises on all ranks at one step."""

    def __init__(self, at=None):
        self.at = at
        self.steps = 0

    def on_train_batch_end(self, batch, logs):
        self.steps += 1
        if self.model.optimizer.iterations == self.at:
            raise InterruptedError


@pytest.mark.parametrize(("save_freq", "at", "steps_left"), [(2, 4, 6), ("epoch", 6, 4), (3, 8, 2)])
def test_a_resumed_run_ends_with_the_same_bits(comm, shared, save_freq, at, steps_left):
    values, digest, *_ = train(callbacks=[Interrupt()])
    backup = dt.callbacks.BackupAndRestore(shared, save_freq=save_freq)
    was_interrupted = False
    try:
        train(callbacks=[Interrupt(at), backup])
    except InterruptedError:
        was_interrupted = True
    interrupt = Interrupt()
    resumed, resumed_digest, *_ = train(callbacks=[interrupt, backup])
    claims.holds(
        comm,
        was_interrupted,
        interrupt.steps == steps_left,
        resumed.tobytes() == values.tobytes(),
        resumed_digest == digest,
    )


def test_a_saved_model_is_loaded_by_all_ranks(comm, shared):
    _, digest, predicted, model = train()
    model.save(shared)
    loaded = dt.load_model(shared)
    claims.holds(
        comm,
        dt.state_digest(loaded) == digest,
        np.array_equal(loaded.predict(worlds.digits(47)[0]), predicted),
        loaded.optimizer.iterations == model.optimizer.iterations == 8,
    )


def test_a_checkpoint_that_cannot_be_written_is_an_error_on_all_ranks(comm, shared, tmp_path):
    (tmp_path / "file").write_text("")
    found = errors(comm, lambda: worlds.dense_net().save(f"{shared}/file"))
    assert [kind for kind, _ in found] == [CheckpointError.__name__] * comm.world_size
    assert all(f"{shared}/file" in text for _, text in found)


@pytest.mark.parametrize("floatx", ["float32", "float64"])
def test_a_reproducible_fit_gives_the_bits_of_one_worker(comm, floatx):
    def train():
        x, y = worlds.digits(47)
        model = worlds.conv_net("adam", ["accuracy"])
        history = model.fit(x, y, 13, 3, verbose=0, reproducible=True, validation_data=worlds.digits(9, start=100))
        return dt.state_digest(model), history.history

    backend.set_floatx(floatx)
    ours = train()
    with dt.comm.use(dt.comm.connect("local")):
        alone = train()
    claims.holds(comm, ours == alone)
