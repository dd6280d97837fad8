"""Matrix products are their definition: within what summation in any order may differ, and no byte beyond."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, ops
from disttrain.autodiff.ops.matrix import _matmul
from disttrain.kernels import matmul as kernels
from tests.kernels.shapes import PRODUCTS

UNIT = 2.0**-24  # of rounding to float32
EVERY_SHAPE = pytest.mark.parametrize("shape", PRODUCTS, ids=lambda s: "x".join(map(str, s)))
LIES = list(itertools.product(("rows", "columns", "apart"), repeat=2))
EVERY_LIE = pytest.mark.parametrize("lies", LIES, ids="-".join)


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def lying(array, how, copy=np.ascontiguousarray):
    """Return `array` as another view: with rows or columns that lie together, or neither."""
    if how == "rows":
        return copy(array)
    if how == "columns":
        return copy(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    return copy(np.repeat(np.repeat(array, 2, -1), 3, -2))[..., ::3, ::2]


def computed(kernel, *arrays, **attributes):
    """Return what a kernel computes. Its launch does not keep its arguments alive; this does."""
    return kernel(*arrays, **attributes).run()


def bounded(got, exact, sizes, terms):
    """Assert that a sum of `terms` products is what it is, but for rounding.

    Higham, "Accuracy and stability of numerical algorithms", (3.5): in any order; one term more for a bias.
    """
    assert got.shape == exact.shape
    assert got.dtype == np.float32
    gamma = (terms + 2) * UNIT / (1 - (terms + 2) * UNIT)
    assert (np.abs(got - exact) <= gamma * sizes).all()


@EVERY_SHAPE
@EVERY_LIE
def test_is_the_definition_in_float64_but_for_rounding(shape, lies, instruction_set, guarded):
    m, n, k = shape
    a, b = numbers(m, k), numbers(k, n, seed=1)
    got = computed(kernels.matmul, lying(a, lies[0], guarded.copy), lying(b, lies[1], guarded.copy))
    bounded(got, a.astype(float) @ b, np.abs(a).astype(float) @ np.abs(b), k)


@EVERY_SHAPE
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "none"])
def test_dense_is_its_definition_in_float64_but_for_rounding(shape, activation, has_bias, instruction_set, guarded):
    m, n, k = shape
    x, kernel = numbers(m, k), numbers(k, n, seed=1)
    bias = numbers(n) if has_bias else None
    given = [None if a is None else guarded.copy(a) for a in (x, kernel, bias)]
    for how in ("rows", "columns"):
        got = computed(kernels.dense, lying(given[0], how), *given[1:], activation=activation)
        exact = ops.dense.definition(x.astype(float), kernel.astype(float), bias, activation=activation)
        sizes = np.abs(x).astype(float) @ np.abs(kernel) + (np.abs(bias) if has_bias else 0)
        bounded(got, exact, sizes, k)


@EVERY_SHAPE
def test_the_bits_of_an_element_follow_from_its_row_and_its_column_alone(shape, instruction_set, guarded):
    m, n, k = shape
    a, b = numbers(m, k), numbers(k, n, seed=1)
    whole = computed(kernels.matmul, a, b)
    for a_lies, b_lies, shift in [("rows", "rows", 4), ("columns", "apart", 36), ("apart", "columns", 0)]:
        left = lying(a, a_lies, lambda x, s=shift: guarded.copy(x, s))
        right = lying(b, b_lies, lambda x, s=shift: guarded.copy(x, s))
        assert computed(kernels.matmul, left, right).tobytes() == whole.tobytes()
        for i, j in itertools.product({0, m // 2, m - 1}, {0, n // 3, n - 1}):
            row = computed(kernels.matmul, left[i : i + 1], right)
            assert row.tobytes() == whole[i].tobytes()
            column = computed(kernels.matmul, left, right[:, j : j + 1])
            assert column.tobytes() == whole[:, j].tobytes()
            part = computed(kernels.matmul, left[i:], right[:, j:])
            assert part.tobytes() == whole[i:, j:].tobytes()


@EVERY_SHAPE
def test_what_follows_a_product_rounds_as_ops_do(shape, instruction_set):
    m, n, k = shape
    x, kernel, bias = numbers(m, k), numbers(k, n, seed=1), numbers(n)
    for how in ("rows", "columns"):
        product = computed(kernels.matmul, lying(x, how), kernel)
        got = computed(kernels.dense, lying(x, how), kernel, bias, activation="relu")
        np.testing.assert_array_equal(got, np.maximum(product + bias, 0))


BATCHES = [
    ((2, 3), (2,)),
    ((4,), (4,)),
    ((2, 3), (1, 3)),
    ((2, 1, 2), (3, 1)),
    ((), (3,)),
    ((1, 5), ()),
    ((0,), (0,)),
    ((2, 1, 2, 1, 2, 1), (1, 2, 1, 2, 1, 2)),  # more axes than the kernel has
]


@pytest.mark.parametrize("batches", BATCHES, ids=str)
@EVERY_LIE
def test_batches_broadcast_as_in_the_definition(batches, lies, instruction_set, guarded):
    a, b = numbers(*batches[0], 5, 3), numbers(*batches[1], 3, 7, seed=1)
    try:
        exact = a.astype(float) @ b
    except ValueError:  # (2, 3) and (2,) do not broadcast
        assert kernels.matmul(a, b) is None
        return
    left, right = lying(a, lies[0], guarded.copy), lying(b, lies[1], guarded.copy)
    if exact.ndim > 6:
        assert kernels.matmul(left, right) is None
        return
    got = computed(kernels.matmul, left, right)
    bounded(got, exact, np.abs(a).astype(float) @ np.abs(b), 3)
    if got.size:
        alone = computed(kernels.matmul, a[(-1,) * len(batches[0])], b[(-1,) * len(batches[1])])
        assert alone.tobytes() == got[(-1,) * (got.ndim - 2)].tobytes()


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))), ids=str)
def test_a_batch_times_one_matrix_is_a_product_however_it_lies(axes, instruction_set, guarded):
    a, b = numbers(4, 6, 9), numbers(9, 5, seed=1)
    view = guarded.copy(a.transpose(axes)).transpose(np.argsort(axes))
    got = computed(kernels.matmul, view, b)
    assert got.tobytes() == computed(kernels.matmul, a.reshape(-1, 9), b).tobytes()
    bias = numbers(5)
    dense = computed(kernels.dense, view, b, bias, activation="relu")
    np.testing.assert_array_equal(dense, np.maximum(got + bias, 0))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (20, 30, 0), (40, 3, 0)], ids=str)
def test_empty_products_are_zero_and_their_bias(shape, instruction_set, guarded):
    m, n, k = shape
    bias = numbers(n)
    np.testing.assert_array_equal(computed(kernels.matmul, numbers(m, k), numbers(k, n)), np.zeros((m, n)))
    got = computed(kernels.dense, numbers(m, k), numbers(k, n), guarded.copy(bias), activation="relu")
    np.testing.assert_array_equal(got, np.maximum(np.zeros((m, n), np.float32) + bias, 0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(15, 33, 17), (40, 3, 5), (20, 50, 400)], ids=str)
def test_nan_and_infinity_reach_what_they_reach_in_the_definition(value, shape, instruction_set):
    m, n, k = shape
    for in_a, how in itertools.product((True, False), ("rows", "columns")):
        a, b, bias = numbers(m, k), numbers(k, n, seed=1), numbers(n)
        a[m // 2, k // 3] = value if in_a else a[m // 2, k // 3]
        b[k // 2, n // 2] = b[k // 2, n // 2] if in_a else value
        b[k // 3, 0] = 0
        with np.errstate(invalid="ignore"):
            expected = a @ b
            rectified = np.maximum(expected + bias, 0)
        for made, wanted in [
            (computed(kernels.matmul, lying(a, how), b), expected),
            (computed(kernels.dense, lying(a, how), b, bias, activation="relu"), rectified),
        ]:
            np.testing.assert_array_equal(np.isnan(made), np.isnan(wanted))
            np.testing.assert_array_equal(made[np.isinf(wanted)], wanted[np.isinf(wanted)])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(float),
        lambda x: x.astype(np.float16),
        lambda x: x.astype(">f4"),
        lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
    ],
    ids=["float64", "float16", "swapped", "unaligned"],
)
def test_the_definition_computes_what_the_kernel_cannot_read(change, instruction_set):
    a, b = numbers(4, 5), numbers(5, 6)
    assert kernels.matmul(change(a), b) is None
    assert kernels.dense(a, change(b), None) is None
    assert kernels.dense(a, b, change(numbers(6))) is None
    got, expected = _matmul(change(a), change(b)), _matmul.definition(change(a), change(b))
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def test_shapes_that_do_not_fit_are_the_definitions_to_refuse(instruction_set):
    for a, b in [((2, 3), (4, 5)), ((2, 2, 3), (3, 3, 4))]:
        assert kernels.matmul(numbers(*a), numbers(*b)) is None
        with pytest.raises(ValueError, match=r"mismatch|broadcast"):
            ops.matmul(numbers(*a), numbers(*b))
    with pytest.raises(ValueError, match="broadcast"):
        ops.dense(numbers(2, 3), numbers(3, 4), numbers(5))
    with pytest.raises(dt.errors.ConfigError, match="unknown activation of dense 'tanh'"):
        ops.dense(numbers(2, 3), numbers(3, 4), None, activation="tanh")


def test_the_ops_and_their_gradients_compute_by_the_kernel(instruction_set, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "new_array", lambda shape, out: asked.append(shape) or np.empty(shape, np.float32))
    x, kernel, bias = (Tensor(numbers(*shape), requires_grad=True) for shape in [(2, 6, 5), (5, 4), (4,)])
    ops.dense(x, kernel, bias, activation="relu").sum().backward()
    (x @ kernel).sum().backward()
    assert asked == [(2, 6, 4), (2, 6, 5), (5, 4)] * 2


def test_threads_that_compute_at_once_do_not_disturb_each_other(instruction_set):
    cases = [(numbers(m, k), numbers(k, n)) for m, n, k in PRODUCTS] * 5
    expected = [computed(kernels.matmul, *case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda case: computed(kernels.matmul, *case), cases))
    for mine, alone in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, alone)
