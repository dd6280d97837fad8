"""Bad input ends on every rank with an error that names what is wrong, and nobody waits for anybody."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.errors import ConfigError, DataError, NonFiniteError, ShapeError
from tests.training import worlds

pytestmark = pytest.mark.timeout(30)

X, Y = worlds.blobs(20)


def of(y):
    return lambda: worlds.dense_net().fit(X, y, verbose=0)


def with_label(label):
    y = Y.copy()
    y[7] = label
    return y


def fit(x=X, y=Y, **kwargs):
    return lambda: worlds.dense_net().fit(x, y, verbose=0, **kwargs)


def compiled(**kwargs):
    return lambda: dt.Sequential([dt.layers.Dense(3, input_shape=(4,))]).compile(**{"loss": "mse", **kwargs})


def not_built():
    return dt.Sequential([dt.layers.Dense(3)])


def not_compiled():
    dt.Sequential([dt.layers.Dense(3, input_shape=(4,))]).fit(X, Y)


BAD = {
    "label too large": (fit(y=with_label(3)), DataError, "label 3 of sample 7 is outside the classes 0 to 2"),
    "label negative": (fit(y=with_label(-1)), DataError, "label -1 of sample 7 is outside the classes"),
    "label broken": (fit(y=with_label(1) + 0.5), DataError, "label"),
    "lengths": (fit(y=Y[:19]), DataError, "x has 20 samples and y has 19"),
    "no samples": (fit(X[:0], Y[:0]), DataError, "x has no samples"),
    "no targets": (fit(y=None), DataError, "need targets: give y"),
    "texts": (fit(x=X.astype(str)), DataError, "x must be made of numbers"),
    "ragged": (fit(x=[[1.0, 2, 3, 4], [1.0]], y=[0, 1]), DataError, "its samples differ in shape"),
    "one-hot targets": (fit(y=np.eye(3)[Y]), ShapeError, "use loss='categorical_crossentropy'"),
    "batch_size 0": (fit(batch_size=0), ConfigError, "batch_size must be 1 or more, not 0"),
    "batch_size -1": (fit(batch_size=-1), ConfigError, "batch_size must be 1 or more, not -1"),
    "batch_size None": (fit(batch_size=None), ConfigError, "batch_size must be an integer, not None"),
    "epochs 0": (fit(epochs=0), ConfigError, "epochs must be an integer of at least 1, not 0"),
    "initial_epoch -1": (fit(initial_epoch=-1), ConfigError, "initial_epoch must be an integer of at least 0, not -1"),
    "validation_split 1": (fit(validation_split=1.0), ConfigError, "validation_split is a share between 0 and 1"),
    "validation_split -0.1": (fit(validation_split=-0.1), ConfigError, "validation_split"),
    "validation_split 1.5": (fit(validation_split=1.5), ConfigError, "validation_split"),
    "all is held back": (fit(validation_split=0.99), DataError, "x has no samples"),
    "split and data": (fit(validation_split=0.5, validation_data=(X, Y)), ConfigError, "excludes validation_data"),
    "validation lengths": (fit(validation_data=(X, Y[1:])), DataError, "x has 20 samples and y has 19"),
    "validation inputs only": (fit(validation_data=X), ConfigError, "validation_data is a pair, inputs and targets"),
    "validation weights": (fit(validation_data=(X, Y, Y)), ConfigError, "a pair, inputs and targets, not 3 things"),
    "validation labels": (fit(validation_data=(X, with_label(9))), DataError, "label 9 of sample 7"),
    "width": (
        fit(x=X[:, :3]),
        ShapeError,
        r"layer 'dense' \(Dense\).*expected an input of shape \(samples, 4\), received \(\w+, 3\)",
    ),
    "validation width": (fit(validation_data=(X[:, :3], Y)), ShapeError, r"'dense'.*received \(\w+, 3\)"),
    "predict's width": (lambda: worlds.dense_net().predict(X[:, :3]), ShapeError, r"'dense'.*received \(\d+, 3\)"),
    "not compiled": (not_compiled, ConfigError, r"call compile\(optimizer, loss\) first"),
    "no loss": (compiled(loss=None), ConfigError, r"compile\(\) needs a loss"),
    "optimizer": (compiled(optimizer="adm"), ConfigError, "unknown optimizer 'adm'; did you mean 'adam'"),
    "loss": (compiled(loss="mean_square_error"), ConfigError, "unknown loss .* did you mean 'mean_squared_error'"),
    "metric": (compiled(metrics=["acuracy"]), ConfigError, "unknown metric 'acuracy'; did you mean 'accuracy'"),
    "activation": (lambda: dt.layers.Dense(3, "relou"), ConfigError, "unknown activation 'relou'; did you mean 'relu'"),
    "padding": (lambda: dt.layers.Conv2D(3, 3, padding="sam"), ConfigError, "did you mean 'same'"),
    "initializer": (
        lambda: dt.Sequential([dt.layers.Dense(3, kernel_initializer="glorot", input_shape=(4,))]),
        ConfigError,
        "unknown initializer 'glorot'",
    ),
    "no layers": (lambda: dt.Sequential().predict(X), ConfigError, "this Sequential has no layers"),
    "a function as a layer": (lambda: dt.Sequential([dt.ops.relu]), ConfigError, "Sequential takes layers"),
    "save without weights": (lambda: not_built().save("x"), ConfigError, r"save\(\): the model has no weights"),
    "load without weights": (lambda: not_built().load("x"), ConfigError, r"load\(\): the model has no weights"),
    "save_freq": (lambda: dt.callbacks.BackupAndRestore("x", save_freq=0), ConfigError, "save_freq is 'epoch' or"),
    "mode": (lambda: dt.callbacks.EarlyStopping(mode="mni"), ConfigError, "unknown mode 'mni'; did you mean 'min'"),
    "followed value": (
        fit(callbacks=[dt.callbacks.EarlyStopping(monitor="val_loss")]),
        ConfigError,
        "EarlyStopping follows 'val_loss', which is not there: loss; give fit.. validation_data",
    ),
    "followed name": (
        fit(callbacks=[dt.callbacks.ModelCheckpoint("x", monitor="los", save_best_only=True)]),
        ConfigError,
        "ModelCheckpoint follows 'los', which is not there: loss$",
    ),
    "two metrics of a name": (compiled(metrics=["mse", "mse"]), ConfigError, "two metrics are called 'mse'"),
    "a metric called loss": (compiled(metrics=[dt.metrics.F1Score("loss")]), ConfigError, "are called 'loss'"),
}  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_on_every_rank(case, world_size):
    action, kind, text = BAD[case]
    found = worlds.errors(world_size, lambda comm: action())
    assert [type(error) for error in found] == [kind] * world_size
    for error in found:
        with pytest.raises(kind, match=text):
            raise error


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_nan_in_the_data_names_step_and_ranks_and_changes_no_weight(world_size):
    # 20 samples in batches of 9: the last of the second batch lies with the last rank
    x = X.copy()
    x[17] = np.nan
    after, before = {}, {}

    def train(comm):
        model = dt.Sequential(
            [
                dt.layers.Dense(6, activation="tanh", input_shape=(4,)),
                dt.layers.BatchNormalization(synchronized=False),
                dt.layers.Dense(3, activation="softmax"),
            ]
        )
        model.compile("adam", "sparse_categorical_crossentropy")
        model.fit(x[:9], Y[:9], batch_size=9, shuffle=False, verbose=0)
        before[comm.rank] = worlds.weights(model) | {"iterations": np.array(model.optimizer.iterations)}
        try:
            model.fit(x, Y, batch_size=9, shuffle=False, verbose=0, callbacks=[Remember(before, comm.rank)])
        finally:
            after[comm.rank] = worlds.weights(model) | {"iterations": np.array(model.optimizer.iterations)}

    found = worlds.errors(world_size, train)
    assert [type(error) for error in found] == [NonFiniteError] * world_size
    where = f"at step 2 (counted from 0 over all epochs) on rank {world_size - 1} (nan) of {world_size}"
    assert all(where in str(error) for error in found)
    assert all("no weight was changed" in str(error) for error in found)
    for rank in range(world_size):
        worlds.assert_equal(after[rank], before[rank])


class Remember(dt.callbacks.Callback):
    """Keeps the weights as the last good step left them."""

    def __init__(self, place, rank):
        self.place, self.rank = place, rank

    def on_train_batch_end(self, batch, logs):
        self.place[self.rank] = worlds.weights(self.model) | {"iterations": np.array(self.model.optimizer.iterations)}


def test_a_nan_reaches_all_ranks_through_synchronized_statistics():
    x = X.copy()
    x[19] = np.nan

    def train(comm):
        model = dt.Sequential(
            [dt.layers.BatchNormalization(input_shape=(4,)), dt.layers.Dense(3, activation="softmax")]
        )
        model.compile("sgd", "sparse_categorical_crossentropy")
        try:
            model.fit(x, Y, batch_size=20, shuffle=False, verbose=0)
        finally:
            assert np.isfinite(model.layers[0].moving_mean.data).all()

    kind, message = worlds.agreed(3, train)
    assert kind is NonFiniteError
    assert "rank 0 (nan), rank 1 (nan), rank 2 (nan) of 3" in message


def test_a_learning_rate_far_too_large_is_named():
    def train(comm):
        model = dt.Sequential([dt.layers.Dense(1, input_shape=(4,))])
        model.compile(dt.optimizers.SGD(1e30), "mse")
        with np.errstate(all="ignore"):
            model.fit(X, Y, batch_size=10, epochs=3, verbose=0)

    kind, message = worlds.agreed(2, train)
    assert kind is NonFiniteError
    assert "lower the learning rate" in message


class FailsOnOneRank(dt.callbacks.Callback):
    def __init__(self, rank, event):
        self.rank, self.event = rank, event

    def on_train_batch_end(self, batch, logs):
        self.fail("step")

    def on_epoch_end(self, epoch, logs):
        self.fail("epoch")

    def fail(self, event):
        if event == self.event and dt.comm.current().rank == self.rank:
            raise OSError("disk gone")


@pytest.mark.parametrize("event", ["step", "epoch"])
@pytest.mark.parametrize("rank", [0, 2])
def test_an_exception_on_one_rank_only_ends_all_ranks(event, rank):
    others = {}

    def train(comm):
        try:
            fit(batch_size=5, epochs=2, callbacks=[FailsOnOneRank(rank, event)])()
        except dt.errors.CommError as error:
            others[comm.rank] = str(error)
            raise

    with pytest.raises(OSError, match="disk gone") as caught:
        dt.comm.threads.run(3, train)
    assert caught.value.__notes__ == [f"rank {rank} failed first, of 3 ranks in threads"]
    assert sorted(others) == [r for r in range(3) if r != rank]
    assert all(f"rank {rank} failed" in text for text in others.values())
