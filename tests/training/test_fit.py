"""compile, fit, evaluate and predict, as Keras's users know them."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.autodiff import ops
from tests.training import worlds

pytestmark = pytest.mark.timeout(30)

X, Y = worlds.blobs(20)


def test_the_history_has_a_value_of_each_epoch():
    model = worlds.dense_net(metrics=["accuracy", "f1_score"])
    history = model.fit(X, Y, epochs=3, verbose=0, validation_data=(X[:5], Y[:5]))
    assert history.epoch == [0, 1, 2]
    assert list(history.history) == ["loss", "accuracy", "f1_score", "val_loss", "val_accuracy", "val_f1_score"]
    assert all(len(values) == 3 for values in history.history.values())
    assert all(isinstance(value, float) for value in history.history["val_accuracy"])
    assert history.history["f1_score"][0].shape == (3,)
    assert history.history["loss"][2] < history.history["loss"][0]
    # without data to validate on there is nothing called val_
    assert list(model.fit(X, Y, verbose=0).history) == ["loss", "accuracy", "f1_score"]


def test_validation_data_are_evaluated_after_each_epoch():
    model = worlds.dense_net(metrics=["accuracy"])
    history = model.fit(X, Y, epochs=2, verbose=0, validation_data=(X[:7], Y[:7])).history
    loss, accuracy = model.evaluate(X[:7], Y[:7])
    assert history["val_loss"][1] == pytest.approx(loss, rel=1e-6)  # in float32
    assert history["val_accuracy"][1] == accuracy


@pytest.mark.parametrize(("share", "held"), [(0.25, 5), (0.5, 10), (0.33, 7), (0.01, 1)])
def test_validation_split_holds_back_the_last_samples(share, held):
    split, apart = worlds.dense_net(), worlds.dense_net()
    ours = split.fit(X, Y, batch_size=6, epochs=2, verbose=0, validation_split=share).history
    theirs = apart.fit(
        X[:-held], Y[:-held], batch_size=6, epochs=2, verbose=0, validation_data=(X[-held:], Y[-held:])
    ).history
    assert ours == theirs
    assert dt.state_digest(split) == dt.state_digest(apart)


def test_validation_changes_nothing_in_training():
    with_, without = (worlds.conv_net(), worlds.conv_net())
    x, y = worlds.digits(20)
    with_.fit(x, y, verbose=0, validation_data=(x, y))
    without.fit(x, y, verbose=0)
    assert dt.state_digest(with_) == dt.state_digest(without)


def test_initial_epoch_counts_on():
    once, twice = worlds.dense_net("adam", dropout=0.5), worlds.dense_net("adam", dropout=0.5)
    course = once.fit(X, Y, batch_size=6, epochs=5, verbose=0).history["loss"]
    first = twice.fit(X, Y, batch_size=6, epochs=2, verbose=0)
    second = twice.fit(X, Y, batch_size=6, epochs=5, verbose=0, initial_epoch=2)
    assert second.epoch == [2, 3, 4]
    assert first.history["loss"] + second.history["loss"] == course
    assert dt.state_digest(once) == dt.state_digest(twice)
    assert twice.fit(X, Y, epochs=5, initial_epoch=5, verbose=0).epoch == []


def test_fitting_again_keeps_weights_and_optimizer_compiling_again_keeps_weights_only():
    model = worlds.dense_net("adam")
    model.fit(X, Y, batch_size=20, epochs=3, verbose=0)
    assert model.optimizer.iterations == 3
    weights = worlds.weights(model)
    model.fit(X, Y, batch_size=20, verbose=0)
    assert model.optimizer.iterations == 4
    assert any(slot.any() for slots in model.optimizer.slots for slot in slots.values())

    model.compile("adam", "sparse_categorical_crossentropy")
    assert model.optimizer.iterations == 0
    assert model.optimizer.slots == []
    for weight in model.weights:
        weight.data[...] = weights[weight.name]
    fresh = worlds.dense_net("adam")
    for weight in fresh.weights:
        weight.data[...] = weights[weight.name]
    model.fit(X, Y, epochs=2, verbose=0)
    fresh.fit(X, Y, epochs=2, verbose=0)
    assert dt.state_digest(model) == dt.state_digest(fresh)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    def digest(seed):
        dt.utils.set_random_seed(seed)
        model = worlds.conv_net()
        model.fit(*worlds.digits(20), batch_size=8, verbose=0)
        return dt.state_digest(model)

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_evaluate_returns_a_number_a_list_or_a_dict():
    plain, measured = worlds.dense_net(), worlds.dense_net(metrics=["accuracy", "mae"])
    loss = plain.evaluate(X, Y)
    assert isinstance(loss, float)
    one_hot = np.eye(3)[Y]
    measured.compile("sgd", "categorical_crossentropy", ["accuracy", "mae"])
    values = measured.evaluate(X, one_hot)
    assert values[0] == pytest.approx(loss, rel=1e-6)  # float32
    assert measured.evaluate(X, one_hot, return_dict=True) == dict(
        zip(["loss", "accuracy", "mae"], values, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 7, 20, 1000])
def test_the_batch_size_of_evaluate_and_predict_does_not_matter(batch_size):
    model = worlds.dense_net(metrics=["accuracy"])
    np.testing.assert_allclose(model.evaluate(X, Y, batch_size), model.evaluate(X, Y, 20), rtol=1e-6)  # float32
    np.testing.assert_allclose(model.predict(X, batch_size), model.predict(X, 20), rtol=1e-6)


def test_predict_needs_no_compilation_and_changes_no_bits():
    model = dt.Sequential([dt.layers.BatchNormalization(), dt.layers.Dropout(0.5), dt.layers.Dense(2)])
    first = model.predict(X)
    digest = dt.state_digest(model)
    assert first.shape == (20, 2)
    assert first.dtype == "float32"
    np.testing.assert_array_equal(model.predict(X), first)
    assert dt.state_digest(model) == digest


def test_integers_and_lists_are_data_too():
    x, y = np.arange(12).reshape(4, 3) % 5, [0, 1, 0, 1]
    model = dt.Sequential([dt.layers.Dense(2, activation="softmax", input_shape=(3,))])
    model.compile("sgd", "sparse_categorical_crossentropy")
    loss = model.evaluate(x, y)
    assert model.evaluate(x.tolist(), y) == loss == model.evaluate(x.astype("float64"), np.array(y)[:, None])


def huber(y_true, y_pred):
    error = y_pred - y_true.reshape(y_pred.shape)
    return ops.maximum(abs(error) - 0.5, error * error * 0.5)  # not Huber's own, but bent as his


class LargestError(dt.metrics.Metric):
    name = "worst"

    def sums(self, y_true, y_pred):
        return np.array([(np.abs(y_pred - y_true.reshape(y_pred.shape)) > 1).sum(), y_pred.size], np.float64)


@pytest.mark.parametrize("reduced", [False, True])
def test_a_loss_and_a_metric_of_one_s_own(float64, reduced):
    loss = (lambda t, p: huber(t, p).mean()) if reduced else huber
    model = dt.Sequential([dt.layers.Dense(1, input_shape=(4,))])
    model.compile(dt.optimizers.SGD(0.1), loss, [LargestError()])
    w, b = (weight.data.copy() for weight in model.weights)
    y = X[:, :1] * 2 + 1
    history = model.fit(X, y, batch_size=20, verbose=0, shuffle=False).history
    error = X @ w + b - y
    slope = np.where(np.abs(error) - 0.5 > error**2 / 2, np.sign(error), error) / 20
    np.testing.assert_allclose(model.weights[0].data, w - 0.1 * X.T @ slope, rtol=1e-12)
    np.testing.assert_allclose(model.weights[1].data, b - 0.1 * slope.sum(), rtol=1e-12)
    assert history["worst"] == [(np.abs(error) > 1).mean()]
    assert history["loss"] == pytest.approx([np.maximum(np.abs(error) - 0.5, error**2 / 2).mean()])


def test_one_epoch_prints_a_line_with_verbose_1_and_2_and_nothing_with_0(capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    model = worlds.dense_net(metrics=["accuracy", "f1_score"])
    model.fit(X, Y, epochs=2, verbose=0)
    assert capsys.readouterr() == ("", "")
    for verbose in (1, 2, "auto"):
        history = model.fit(X, Y, epochs=2, verbose=verbose, validation_data=(X, Y)).history
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert err == ""
        assert [line.split("  ")[0] for line in lines] == ["Epoch 1/2", "Epoch 2/2"]
        assert " samples/s  loss " in lines[0]
        for name in ("loss", "accuracy", "val_loss"):
            assert f"  {name} {history[name][1]:.4f}" in lines[1]
        assert "  f1_score [" in lines[1]


def test_none_is_the_default_of_metrics_and_callbacks():
    model = dt.Sequential([dt.layers.Dense(1, input_shape=(4,))])
    model.compile("sgd", "mse", None)
    assert list(model.fit(X, Y, verbose=0, callbacks=None).history) == ["loss"]


def test_only_rank_0_prints(capsys):
    dt.comm.threads.run(3, lambda comm: worlds.dense_net().fit(X, Y, epochs=2, verbose=2))
    assert len(capsys.readouterr().out.splitlines()) == 2


class Interrupted(dt.callbacks.Callback):
    def on_train_batch_end(self, batch, logs):
        raise KeyboardInterrupt


def test_an_interrupted_bar_gives_the_cursor_back(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    with pytest.raises(KeyboardInterrupt):
        worlds.dense_net().fit(X, Y, callbacks=[Interrupted()])
    out = capsys.readouterr().out
    assert out.rfind("\x1b[?25h") > out.rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize(("verbose", "lines"), [(0, 0), (1, 1), (2, 1), ("auto", 1)])
def test_evaluate_says_its_values_on_rank_0_if_asked(verbose, lines, capsys):
    dt.comm.threads.run(3, lambda comm: worlds.dense_net().evaluate(X, Y, 6, verbose))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    assert all(line.startswith("Evaluation  loss ") for line in said)


@pytest.mark.parametrize("verbose", [0, 2])
def test_predict_shows_a_bar_if_asked_and_on_a_terminal(verbose, capsys, monkeypatch):
    model = worlds.dense_net()
    quiet = model.predict(X, 6, verbose=1)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    np.testing.assert_array_equal(model.predict(X, 6, verbose=verbose), quiet)
    assert capsys.readouterr().out == ""
    np.testing.assert_array_equal(model.predict(X, 6, verbose=1), quiet)
    assert "Prediction" in capsys.readouterr().out
