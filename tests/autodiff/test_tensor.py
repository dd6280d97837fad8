"""Tensor: an array with a history, that behaves as an array where it can."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, ops


@pytest.fixture
def x():
    return Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True, name="x")


def test_an_array_is_kept_and_not_copied():
    array = np.ones(3, np.float16)
    assert Tensor(array).data is array
    assert Tensor(Tensor(array)).data is array


@pytest.mark.parametrize(("value", "dtype"), [(1.5, "float32"), ([1.5], "float32"), (1, "int64"), (True, "bool")])
def test_python_numbers_become_arrays(value, dtype):
    tensor = Tensor(value)
    assert (tensor.dtype, tensor.data.tolist()) == (dtype, value)


def test_floatx_is_the_dtype_of_python_floats():
    try:
        dt.backend.set_floatx("float64")
        assert Tensor([0.1]).data == 0.1
    finally:
        dt.backend.set_floatx("float32")


def test_what_an_array_says_of_itself(x):
    assert (x.shape, x.ndim, x.size, x.dtype, len(x)) == ((2, 3), 2, 6, "float64", 2)
    assert x.numpy() is x.data
    assert x[1, 2].item() == 5
    assert (float(x[1, 2]), int(x[1, 2]), bool(x[0, 0])) == (5.0, 5, False)


def test_numpy_takes_tensors(x):
    assert np.asarray(x) is x.data
    assert np.asarray(x, dtype="float32").dtype == "float32"
    copy = np.array(x)
    copy[:] = 0
    assert x.data[1, 2] == 5
    np.testing.assert_array_equal(np.concatenate([x, x]), np.concatenate([x.data, x.data]))


OPERATORS = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    lambda a, b: a / b,
    lambda a, b: a**b,
    lambda a, b: a @ b.T,
]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("left", [Tensor, np.asarray], ids=["tensor", "array"])
@pytest.mark.parametrize("right", [Tensor, np.asarray], ids=["tensor", "array"])
def test_operators_mix_arrays_and_tensors(operator, left, right):
    a, b = np.array([[1.0, 2], [3, 4]]), np.array([[0.5, 2], [1, 3]])
    got = operator(left(a), right(b))
    assert isinstance(got, Tensor) == (Tensor in (left, right))
    np.testing.assert_array_equal(np.asarray(got), operator(a, b))


@pytest.mark.parametrize("operator", OPERATORS[:5])
def test_operators_take_numbers_on_both_sides(operator):
    a = np.array([1.0, 2])
    for number in (2, 2.5, np.float64(2.5), np.array(2.5)):
        for got, expected in (
            (operator(Tensor(a), number), operator(a, number)),
            (operator(number, Tensor(a)), operator(number, a)),
        ):
            assert isinstance(got, Tensor)
            np.testing.assert_array_equal(got.data, expected)


def test_an_array_plus_a_tensor_is_recorded(x):
    (np.ones((2, 3)) * 3 * x).sum().backward()
    np.testing.assert_array_equal(x.grad, np.full((2, 3), 3))


def test_negation_absolute_value_and_transposition(x):
    np.testing.assert_array_equal((-x).data, -x.data)
    np.testing.assert_array_equal(abs(-x).data, x.data)
    np.testing.assert_array_equal(x.T.data, x.data.T)


@pytest.mark.parametrize("operator", ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"])
def test_comparisons_give_arrays_of_bool(x, operator):
    for other in (2, np.full((2, 3), 2.0), Tensor(np.full((2, 3), 2.0))):
        got = getattr(x, operator)(other)
        assert type(got) is np.ndarray
        np.testing.assert_array_equal(got, getattr(x.data, operator)(np.full((2, 3), 2.0)))
    np.testing.assert_array_equal(np.full((2, 3), 2.0) < x, x.data > 2)


def test_tensors_hash_by_identity(x):
    same = Tensor(x.data)
    assert {x: 1, same: 2}[same] == 2
    assert len({x, same, x}) == 2


def test_a_truth_value_of_several_numbers_is_an_error(x):
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x)


INDICES = [
    1,
    -1,
    (1, 2),
    slice(1),
    (slice(None), 0),
    (..., None),
    [1, 0, 1],
    np.array([True, False]),
    (np.array([0, 1]), [2, 2]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_numpys(x, index):
    np.testing.assert_array_equal(x[index].data, x.data[index])


def test_tensors_index_tensors(x):
    np.testing.assert_array_equal(x[Tensor(np.array([1, 1]))].data, x.data[[1, 1]])
    picked = x[Tensor(np.array([0, 1])), Tensor(np.array([2, 2]))]
    picked.sum().backward()
    np.testing.assert_array_equal(x.grad, [[0, 0, 1], [0, 0, 1]])


def test_a_comparison_is_a_mask(x):
    x[x > 3].sum().backward()
    np.testing.assert_array_equal(x.grad, [[0, 0, 0], [0, 1, 1]])


def test_iteration_gives_recorded_rows(x):
    first, second = x
    (first * 2 + second).sum().backward()
    np.testing.assert_array_equal(x.grad, [[2, 2, 2], [1, 1, 1]])
    with pytest.raises(TypeError):
        iter(Tensor(1.0))


@pytest.mark.parametrize("shape", [(3, 2), (-1,), (6, -1), (1, 2, 3)])
def test_reshape_takes_numbers_a_tuple_or_a_list(x, shape):
    for got in (x.reshape(*shape), x.reshape(shape), x.reshape(list(shape))):
        np.testing.assert_array_equal(got.data, x.data.reshape(shape))


def test_one_element_takes_the_shape_of_a_scalar():
    assert Tensor([4.0]).reshape(()).shape == ()


def test_transpose_takes_numbers_or_a_tuple():
    x = Tensor(np.zeros((2, 3, 4)))
    assert x.transpose().shape == (4, 3, 2)
    assert x.transpose(1, 2, 0).shape == x.transpose((1, 2, 0)).shape == (3, 4, 2)


def test_reductions_and_casts_are_methods(x):
    for name in ("sum", "mean", "max"):
        got = getattr(x, name)(axis=1, keepdims=True)
        np.testing.assert_array_equal(got.data, getattr(x.data, name)(axis=1, keepdims=True))
        assert getattr(x, name)().shape == ()
    np.testing.assert_array_equal(x.argmax(axis=1), [2, 2])
    assert x.astype("float16").dtype == "float16"


def test_detach_shares_the_array_and_forgets_the_history(x):
    y = (x * 2).detach()
    assert not y.requires_grad
    assert (y * x).requires_grad
    assert x.detach().data is x.data


def test_repr_shows_values_dtype_name_and_whether_gradients_are_wanted(x):
    assert repr(Tensor(np.array([1.5], "float32"))) == "Tensor([1.5], dtype=float32)"
    assert repr(x) == f"Tensor({x.data}, dtype=float64, name='x', requires_grad=True)"


def test_results_of_ops_are_tensors_of_the_same_class():
    class Mine(Tensor):
        __slots__ = ()

    assert type(ops.exp(Mine(np.ones(1)))) is Mine
