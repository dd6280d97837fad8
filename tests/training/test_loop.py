"""`fit` takes the steps that a training loop written out by hand in NumPy takes."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.comm import threads
from disttrain.data.shard import permute
from tests.training import worlds

pytestmark = pytest.mark.timeout(30)

# float64: a few hundred sums of at most 10 terms each, 2**-53 relative to each
TOLERANCE = 1e-11


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def gradients(w, x, y):
    """Return loss and gradients of a tanh layer and a softmax layer, by the textbook."""
    w1, b1, w2, b2 = w
    hidden = np.tanh(x @ w1 + b1)
    p = softmax(hidden @ w2 + b2)
    loss = -np.log(p[np.arange(len(y)), y])
    dz = (p - np.eye(3)[y]) / len(y)
    dh = (dz @ w2.T) * (1 - hidden**2)
    return loss, [x.T @ dh, dh.sum(axis=0), hidden.T @ dz, dz.sum(axis=0)]


class Sgd:
    """Keras: velocity = momentum * velocity - rate * g; w += velocity."""

    def __init__(self, w):
        self.velocity = [np.zeros_like(a) for a in w]

    def __call__(self, w, g, t):
        for a, v, d in zip(w, self.velocity, g, strict=True):
            v[...] = 0.9 * v - 0.1 * d
            a += v


class Adam:
    """Kingma & Ba with epsilon where Keras has it: before the correction of v."""

    def __init__(self, w):
        self.m, self.v = [np.zeros_like(a) for a in w], [np.zeros_like(a) for a in w]

    def __call__(self, w, g, t):
        for a, m, v, d in zip(w, self.m, self.v, g, strict=True):
            m[...] = 0.9 * m + 0.1 * d
            v[...] = 0.999 * v + 0.001 * d**2
            a -= 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-7)


OPTIMIZERS = {
    "sgd": (Sgd, lambda: dt.optimizers.SGD(0.1, momentum=0.9)),
    "adam": (Adam, lambda: dt.optimizers.Adam(0.01)),
}


def by_hand(w, x, y, rule, *, batch_size, epochs, shuffle):
    """Return the loss of each epoch, changing the weights `w`."""
    course, t = [], 0
    for epoch in range(epochs):
        order = (
            permute(np.arange(len(x)), len(x), seed=dt.backend.seed(), epoch=epoch) if shuffle else np.arange(len(x))
        )
        losses = []
        for start in range(0, len(x), batch_size):
            chosen = order[start : start + batch_size]
            loss, g = gradients(w, x[chosen], y[chosen])
            losses.extend(loss)
            t += 1
            rule(w, g, t)
        course.append(np.mean(losses))
    return course


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_fit_takes_the_steps_of_a_loop_written_by_hand(float64, world_size, optimizer, shuffle):
    x, y = worlds.blobs(23)
    rule, make = OPTIMIZERS[optimizer]

    def fit(comm):
        model = worlds.dense_net(make(), ["accuracy"])
        before = [w.data.copy() for w in model.weights]
        history = model.fit(x, y, batch_size=10, epochs=4, shuffle=shuffle, verbose=0).history
        return before, history, [w.data for w in model.weights]

    for w, history, after in threads.run(world_size, fit):
        course = by_hand(w, x, y, rule(w), batch_size=10, epochs=4, shuffle=shuffle)
        np.testing.assert_allclose(history["loss"], course, rtol=TOLERANCE)
        for ours, theirs in zip(after, w, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_evaluate_is_the_formula(float64):
    x, y = worlds.blobs(23)

    def ask(comm):
        model = worlds.dense_net("sgd", ["accuracy", "precision", "recall"])
        return [w.data for w in model.weights], model.evaluate(x, y, batch_size=6), model.predict(x, batch_size=4)

    for w, (loss, accuracy, precision, recall), predicted in threads.run(2, ask):
        losses, _ = gradients(w, x, y)
        p = softmax(np.tanh(x @ w[0] + w[1]) @ w[2] + w[3])
        np.testing.assert_allclose(predicted, p, rtol=1e-13)
        assert loss == pytest.approx(losses.mean(), rel=1e-13)
        assert accuracy == (p.argmax(axis=1) == y).mean()
        positive, right = p > 0.5, p[np.arange(23), y] > 0.5
        assert precision == pytest.approx(right.sum() / positive.sum(), rel=1e-15)
        assert recall == right.mean()


def test_a_schedule_is_asked_for_each_step(float64):
    steps = []

    def schedule(step):
        steps.append(step)
        return 0.1 if step < 2 else 0.0

    x, y = worlds.blobs(23)
    model = worlds.dense_net(dt.optimizers.SGD(schedule))
    w = [a.data.copy() for a in model.weights]
    model.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
    for start in (0, 10):
        _, g = gradients(w, x[start : start + 10], y[start : start + 10])
        w = [a - 0.1 * d for a, d in zip(w, g, strict=True)]
    assert steps == list(range(6))
    for ours, theirs in zip(model.weights, w, strict=True):
        np.testing.assert_allclose(ours.data, theirs, rtol=TOLERANCE)


def test_dropout_is_drawn_anew_in_each_step_and_not_in_evaluation(float64):
    # a learning rate of 0: what differs between steps is the mask alone
    x, y = worlds.blobs(8)
    model = worlds.dense_net(dt.optimizers.SGD(0.0), dropout=0.5)
    losses = [model.train_on_batch(x, y)["loss"] for _ in range(4)]
    evaluated = [model.evaluate(x, y) for _ in range(3)]
    assert len(set(losses)) == 4
    assert len(set(evaluated)) == 1
