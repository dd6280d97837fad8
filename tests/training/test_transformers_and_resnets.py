"""Models of attention and of residual blocks: three workers train what one trains; labels for every step in time."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, layers
from disttrain.comm import threads
from disttrain.errors import DataError, ShapeError
from tests.layers.blocks import BasicBlock, GPTBlock
from tests.training import worlds

pytestmark = pytest.mark.timeout(60)

STEPS, WORDS, SAMPLES = 6, 11, 17
# The order of sums is all that differs. The longest have 5 samples of 64 pixels, or of 6 steps: an error of at most
# 320 * 2**-53 = 4e-14 of the terms' size in each of 8 steps; the rest is left to what training makes of it.
FLOAT64 = 1e-10


class GPT(dt.Model):
    """Predicts the next of 11 words."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words = layers.Embedding(WORDS, 8)
        self.places = layers.Embedding(STEPS, 8)
        self.blocks = [GPTBlock(8, 2, dropout=0.2), GPTBlock(8, 2)]
        self.norm = layers.LayerNormalization()
        self.head = layers.Dense(WORDS)

    def call(self, x):
        y = self.words(x) + self.places(np.arange(x.shape[1]))
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y))


def gpt():
    """Return a compiled model, and texts in which a word follows from the one before."""
    model = GPT()
    loss = dt.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(dt.optimizers.AdamW(0.01), loss, ["accuracy"])
    start = np.random.default_rng(0).integers(0, WORDS, (SAMPLES, 1))
    text = (start + 3 * np.arange(STEPS + 1)) % WORDS
    return model, text[:, :-1], text[:, 1:]


def resnet():
    """Return a compiled model, and images of digits."""
    model = dt.Sequential(
        [
            layers.Conv2D(3, 3, padding="same", use_bias=False, input_shape=(8, 8, 1)),
            BasicBlock(3),
            BasicBlock(4, 2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(dt.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy", ["accuracy"])
    return model, *worlds.digits(SAMPLES)


def train(comm, make):
    model, x, y = make()
    history = model.fit(x, y, batch_size=5, epochs=2, verbose=0).history
    return {
        "history": {name: np.array(values) for name, values in history.items()},
        "weights": worlds.weights(model),
        "predict": model.predict(x, batch_size=4),
        "evaluate": model.evaluate(x, y, batch_size=4),
        "digest": dt.state_digest(model),
    }


@pytest.mark.parametrize("make", [gpt, resnet])
@pytest.mark.parametrize("world_size", [1, 3])
def test_workers_agree_with_one_in_float64(float64, make, world_size):
    # the last batch has 2 samples: of three workers one has none
    one = worlds.alone(train, make)
    results = threads.run(world_size, train, make)
    assert len({result["digest"] for result in results}) == 1
    worlds.assert_close(results[0]["weights"], one["weights"], FLOAT64)
    worlds.assert_close(results[0]["history"], one["history"], FLOAT64)
    worlds.assert_close({"y": results[0]["predict"]}, {"y": one["predict"]}, FLOAT64)
    np.testing.assert_allclose(results[0]["evaluate"], one["evaluate"], rtol=FLOAT64)


def test_a_gpt_learns_which_word_follows():
    model, x, y = gpt()
    model.fit(x, y, batch_size=SAMPLES, epochs=100, verbose=0)
    # by chance, a loss of log(11) = 2.4 and one right of eleven
    loss, accuracy = model.evaluate(x, y)
    assert loss < 0.24
    assert accuracy > 0.9


def test_a_gpt_is_saved_and_loaded(tmp_path):
    model, x, y = gpt()
    model.train_on_batch(x, y)
    model.save(tmp_path)
    other, _, _ = gpt()
    other(x[:1])
    other.load(tmp_path)
    np.testing.assert_array_equal(other.predict(x), model.predict(x))
    assert other.train_on_batch(x, y) == model.train_on_batch(x, y)
    assert dt.state_digest(other) == dt.state_digest(model)


LOGITS = np.random.default_rng(0).standard_normal((4, 3, 5))
LABELS = np.random.default_rng(1).integers(0, 5, (4, 3))


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("trailing", [(), (1,)])
def test_the_loss_of_labels_for_every_step_is_the_mean_over_the_steps(from_logits, trailing):
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = [np.mean([-np.log(p[i, t, LABELS[i, t]]) for t in range(3)]) for i in range(4)]
    loss = dt.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    outputs = Tensor(LOGITS, requires_grad=True)
    y = outputs if from_logits else dt.ops.softmax(outputs)
    got = loss.per_sample(LABELS.reshape(4, 3, *trailing), y)
    np.testing.assert_allclose(got.data, expected, rtol=0, atol=100 * 2**-53)
    got.sum().backward()
    np.testing.assert_allclose(outputs.grad, (p - np.eye(5)[LABELS]) / 3, rtol=0, atol=100 * 2**-53)
    assert loss(LABELS, y).item() == pytest.approx(np.mean(expected), abs=1e-14)


def test_wrong_labels_for_every_step_are_errors():
    loss = dt.losses.SparseCategoricalCrossentropy(from_logits=True)
    wrong = LABELS.copy()
    wrong[2, 1] = 5
    with pytest.raises(DataError, match="label 5 of sample 2 is outside the classes 0 to 4"):
        loss(wrong, LOGITS)
    with pytest.raises(ShapeError, match=r"labels of shape \(4, 2\) do not fit"):
        loss(LABELS[:, :2], LOGITS)


def test_an_index_without_a_row_ends_training_on_all_ranks(float64):
    def fit(comm):
        model, x, y = gpt()
        x = x.copy()
        x[7, 2] = WORDS
        model.fit(x, y, batch_size=5, verbose=0)

    found = worlds.errors(3, fit)
    own = [str(error) for error in found if isinstance(error, DataError)]
    assert len(own) == 1
    assert "layer 'words' (Embedding): index 11 of sample" in own[0]
    assert all(error is not None for error in found)
