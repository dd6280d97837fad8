"""MultiHeadAttention against the loop over samples and heads."""

import numpy as np
import pytest

from disttrain import Tensor, check_grads, layers
from disttrain.errors import ConfigError, ShapeError
from disttrain.layers import MultiHeadAttention, Step, running
from tests.autodiff import naive

RANDOM = np.random.default_rng(0)
QUERY, VALUE, KEY = (RANDOM.standard_normal(shape) for shape in ((3, 4, 6), (3, 5, 7), (3, 5, 2)))
# chains of two projections of 7 terms, scores of 3, a softmax, means of 5, an output of 8: numbers below 20
TOLERANCE = {"rtol": 0, "atol": 200 * 20 * 2**-53}


def random(generator, shape):
    return generator.standard_normal(shape)


def make(*args, **options):
    options = {"bias_initializer": random, "dtype": "float64", "name": "mha"} | options
    return MultiHeadAttention(*args, **options)


def formula(layer, query, value, key=None, mask=None, causal=False):
    """Return output and weights, one sample, head and query after the other."""
    key = value if key is None else key
    w = {weight.name.removeprefix("mha/"): weight.data for weight in layer.weights}
    zero = np.zeros(())
    heads = layer.num_heads
    scores = np.zeros((len(query), heads, query.shape[1], key.shape[1]))
    y = np.zeros((len(query), query.shape[1], w["attention_output/kernel"].shape[-1]))
    for sample in range(len(query)):
        for head in range(heads):
            q, k, v = (
                x[sample] @ w[f"{name}/kernel"][:, head] + (w[f"{name}/bias"][head] if layer.use_bias else zero)
                for name, x in (("query", query), ("key", key), ("value", value))
            )
            for i in range(len(q)):
                seen = [
                    j for j in range(len(k)) if (mask is None or mask[sample, head, i, j]) and not (causal and j > i)
                ]
                share = naive.softmax(k[seen] @ q[i] / np.sqrt(q.shape[1]))
                scores[sample, head, i, seen] = share
                y[sample, i] += share @ v[seen] @ w["attention_output/kernel"][head]
    return y + (w["attention_output/bias"] if layer.use_bias else zero), scores


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("value_dim", "output_shape"), [(None, None), (4, 3)])
@pytest.mark.parametrize("with_key", [True, False])
def test_it_is_the_loop_over_samples_heads_and_queries(with_key, value_dim, output_shape, use_bias):
    layer = make(2, 3, value_dim, output_shape=output_shape, use_bias=use_bias)
    key = KEY if with_key else None
    y = layer(QUERY, VALUE, key)
    assert layer.output_shape == (None, 4, output_shape or 6)
    expected, weights = formula(layer, QUERY, VALUE, key)
    np.testing.assert_allclose(y.data, expected, **TOLERANCE)
    y, scores = layer(QUERY, VALUE, key=key, return_attention_scores=True)
    np.testing.assert_allclose(y.data, expected, **TOLERANCE)
    np.testing.assert_allclose(scores.data, weights, **TOLERANCE)
    assert layer.output_shape == (None, 4, output_shape or 6)


def masks():
    per_query = RANDOM.integers(0, 2, (4, 5)) | np.eye(4, 5, dtype=int)
    per_sample = RANDOM.integers(0, 2, (3, 4, 5)) | np.eye(4, 5, dtype=int)
    per_head = RANDOM.integers(0, 2, (3, 2, 4, 5)) | np.eye(4, 5, dtype=int)
    return {
        "none": (None, None),
        "queries": (per_query, per_query[None, None]),
        "samples": (per_sample, per_sample[:, None]),
        "one for all samples": (per_sample[:1] == 1, per_sample[:1, None]),
        "heads": (per_head == 1, per_head),
        "keys": (per_sample[:, None, :1] | np.eye(1, 5, dtype=int), per_sample[:, None, :1] | np.eye(1, 5, dtype=int)),
    }


MASKS = masks()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_a_query_gives_no_weight_to_keys_that_it_does_not_see(mask, causal):
    given, full = MASKS[mask]
    full = None if full is None else np.broadcast_to(full, (3, 2, 4, 5))
    layer = make(2, 3)
    y, scores = layer(QUERY, VALUE, attention_mask=given, use_causal_mask=causal, return_attention_scores=True)
    expected, weights = formula(layer, QUERY, VALUE, mask=full, causal=causal)
    np.testing.assert_allclose(y.data, expected, **TOLERANCE)
    np.testing.assert_allclose(scores.data, weights, **TOLERANCE)
    np.testing.assert_array_equal(scores.data[weights == 0], 0)  # to the bit
    again = layer(QUERY, VALUE, attention_mask=given, use_causal_mask=causal)
    np.testing.assert_array_equal(again.data, y.data)


def test_a_mask_may_be_a_tensor_or_a_list():
    layer = make(2, 3)
    mask = [[1, 1, 0, 0, 1]] * 4
    expected = layer(QUERY, VALUE, attention_mask=np.array(mask)).data
    np.testing.assert_array_equal(layer(QUERY, VALUE, attention_mask=mask).data, expected)
    np.testing.assert_array_equal(layer(QUERY, VALUE, attention_mask=Tensor(np.array(mask))).data, expected)


def test_what_comes_later_does_not_change_what_came_before():
    layer = make(2, 3)
    x = RANDOM.standard_normal((1, 6, 6))
    before = layer(x, x, use_causal_mask=True).data
    x[:, 4:] += 1
    after = layer(x, x, use_causal_mask=True).data
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert (after[:, 4:] != before[:, 4:]).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype):
    layer, wide = make(2, 3, dtype=dtype), make(2, 3)
    y = layer(QUERY, VALUE, KEY, use_causal_mask=True)
    wide(QUERY, VALUE, KEY)
    for weight, other in zip(wide.weights, layer.weights, strict=True):
        weight.data[...] = other.data
    expected = wide(QUERY.astype(dtype), VALUE.astype(dtype), KEY.astype(dtype), use_causal_mask=True).data
    assert y.dtype == dtype
    # some 30 roundings of numbers below 20, of which softmax makes up to twice as much
    np.testing.assert_allclose(y.data, expected, rtol=0, atol=60 * 20 * np.finfo(dtype).eps / 2)


def test_weights_have_keras_names_shapes_and_order():
    layer = make(2, 3, 4, output_shape=5)
    layer(QUERY, VALUE, KEY)
    assert [(w.name, w.shape) for w in layer.weights] == [
        ("mha/query/kernel", (6, 2, 3)),
        ("mha/query/bias", (2, 3)),
        ("mha/key/kernel", (2, 2, 3)),
        ("mha/key/bias", (2, 3)),
        ("mha/value/kernel", (7, 2, 4)),
        ("mha/value/bias", (2, 4)),
        ("mha/attention_output/kernel", (2, 4, 5)),
        ("mha/attention_output/bias", (5,)),
    ]
    plain = MultiHeadAttention(2, 3, use_bias=False, name="mha")
    plain(QUERY, QUERY)
    assert [(w.name, w.shape) for w in plain.weights] == [
        *[(f"mha/{name}/kernel", (6, 2, 3)) for name in ("query", "key", "value")],
        ("mha/attention_output/kernel", (2, 3, 6)),
    ]


def test_gradients_in_all_inputs_agree_with_finite_differences():
    layer = make(2, 3)
    layer(QUERY, VALUE, KEY)
    mask = MASKS["samples"][0]
    check_grads(lambda q, v, k: layer(q, v, k, attention_mask=mask[:2], use_causal_mask=True),
                QUERY[:2], VALUE[:2], KEY[:2])  # fmt: skip


def test_dropout_drops_weights_of_values_while_training_only():
    layer = make(2, 3, dropout=0.5)
    y, scores = layer(QUERY, VALUE, return_attention_scores=True)
    np.testing.assert_array_equal(layer(QUERY, VALUE).data, y.data)
    with running(Step(training=True, number=3, first=1)):
        trained, undropped = layer(QUERY, VALUE, return_attention_scores=True)
        np.testing.assert_array_equal(layer(QUERY, VALUE).data, trained.data)
        np.testing.assert_array_equal(undropped.data, scores.data)
        drop = layers.Dropout(0.5, name="mha/dropout", dtype="float64")
        kept = drop(np.ones(scores.shape)).data
    w = {weight.name: weight.data for weight in layer.weights}
    v = np.einsum("bsd,dhk->bhsk", VALUE, w["mha/value/kernel"]) + w["mha/value/bias"][:, None]
    expected = np.einsum("bhts,bhsk,hkd->btd", kept * scores.data, v, w["mha/attention_output/kernel"])
    np.testing.assert_allclose(trained.data, expected + w["mha/attention_output/bias"], **TOLERANCE)
    assert set(kept.ravel()) == {0, 2}
    np.testing.assert_array_equal(layer(QUERY, VALUE, training=True).data != y.data, True)


def test_an_empty_batch_gives_an_empty_batch_and_no_gradients():
    layer = make(2, 3, dropout=0.5)
    query, value = (Tensor(np.zeros((0, *x.shape[1:])), requires_grad=True) for x in (QUERY, VALUE))
    y = layer(query, value, training=True, use_causal_mask=True)
    assert y.shape == (0, 4, 6)
    y.sum().backward()
    assert query.grad.shape == query.shape
    assert value.grad.shape == value.shape
    assert not any(w.grad.any() for w in layer.trainable_weights)


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ((QUERY[0], VALUE), {}, r"'mha' \(MultiHeadAttention\): .*\(samples, steps, 6\), received \(4, 6\)"),
        ((QUERY[..., :5], VALUE), {}, r"\(samples, steps, 6\), received \(3, 4, 5\)"),
        ((QUERY, VALUE[0]), {}, r"expected a value of shape \(3, steps, 7\), received \(5, 7\)"),
        ((QUERY, VALUE[:2]), {}, r"expected a value of shape \(3, steps, 7\), received \(2, 5, 7\)"),
        ((QUERY, VALUE[..., 1:]), {}, r"expected a value of shape .*, received \(3, 5, 6\)"),
        ((QUERY, VALUE, KEY[:, 1:]), {}, r"expected a key of shape \(3, 5, 2\), received \(3, 4, 2\)"),
        ((QUERY, VALUE, KEY), {"attention_mask": np.ones((4, 4), bool)},
         r"attention_mask of bool or integers that broadcasts to .*\(3, 2, 4, 5\), received bool \(4, 4\)"),
        ((QUERY, VALUE, KEY), {"attention_mask": np.ones((7, 3, 2, 4, 5), bool)}, r"received bool \(7, 3, 2, 4, 5\)"),
        ((QUERY, VALUE, KEY), {"attention_mask": np.zeros((4, 5))}, r"received float64 \(4, 5\)"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_an_error_with_layer_expectation_and_shape(args, options, expected):
    layer = make(2, 3)
    layer(QUERY, VALUE, KEY)
    with pytest.raises(ShapeError, match=expected):
        layer(*args, **options)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: MultiHeadAttention(0, 1), "num_heads must be an integer of at least 1, not 0"),
        (lambda: MultiHeadAttention(1, 2.5), r"key_dim must be .*not 2\.5"),
        (lambda: MultiHeadAttention(1, 2, 0), "value_dim"),
        (lambda: MultiHeadAttention(1, 2, output_shape=(3,)), r"output_shape must be .*not \(3,\)"),
        (lambda: MultiHeadAttention(1, 2, dropout=1), "rate must be from 0 to below 1, not 1"),
    ],
)
def test_a_wrong_argument_is_an_error_of_the_constructor(make, expected):
    with pytest.raises(ConfigError, match=expected):
        make()


def test_an_unknown_argument_of_a_call_is_python_s_error():
    with pytest.raises(TypeError, match="causal"):
        make(2, 3)(QUERY, VALUE, causal=True)


def test_a_configuration_makes_the_layer_again():
    layer = MultiHeadAttention(
        2, 3, 4, 0.25, use_bias=False, output_shape=5, kernel_initializer="he_normal", bias_initializer="ones",
        name="mha", dtype="float64", trainable=False,
    )  # fmt: skip
    y = layer(QUERY, VALUE)
    config = layer.get_config()
    again = MultiHeadAttention(**config)
    assert again.get_config() == config
    default = MultiHeadAttention(1, 1).get_config()
    assert all(config[name] != value for name, value in default.items() if name not in ("dtype", "input_shape"))
    np.testing.assert_array_equal(again(QUERY, VALUE).data, y.data)
