"""Every op: its value against NumPy or a naive loop, its gradients against finite differences."""

import numpy as np
import pytest

import disttrain as dt
from disttrain import Tensor, ops
from tests.autodiff.cases import CASES

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_op_has_cases_with_and_without_samples():
    assert {case.op for case in CASES} == set(ops.__all__)
    assert {case.op for case in CASES if case.batched} == set(ops.__all__)


@EVERY_CASE
def test_value_is_the_oracles(case):
    got, expected = case.call(*case.args), np.asarray(case.oracle(*case.args))
    assert got.shape == expected.shape
    # chains of fewer than 100 roundings on numbers below 50; nothing here cancels more than a sum does
    np.testing.assert_allclose(got, expected, rtol=100 * 2**-53, atol=50 * 100 * 2**-53)


@EVERY_CASE
def test_tensors_give_the_same_bits_as_arrays(case):
    tensors = [Tensor(a, requires_grad=True) for a in case.args]
    np.testing.assert_array_equal(case.call(*tensors).data, case.call(*case.args))


@EVERY_CASE
def test_gradients_agree_with_finite_differences(case):
    dt.check_grads(case.call, *case.args)


@EVERY_CASE
def test_gradients_of_gradients_agree_with_finite_differences(case):
    """Of the square: its cotangent depends on the arguments too, so that a rule is differentiated in both."""

    def square(*args):
        y = case.call(*args)
        return y * y

    dt.check_grads(square, *case.args, order=2)


@EVERY_CASE
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_and_gradients_keep_the_dtype(case, dtype):
    tensors = [Tensor(a.astype(dtype), requires_grad=True) for a in case.args]
    y = case.call(*tensors)
    y.backward(np.ones(y.shape))
    assert y.dtype == dtype
    assert [t.grad.dtype for t in tensors] == [dtype] * len(tensors)
    assert [t.grad.shape for t in tensors] == [t.shape for t in tensors]


@pytest.mark.parametrize("case", [c for c in CASES if c.batched], ids=str)
def test_an_empty_batch_passes_forward_and_backward(case):
    args = [a[:0] if i in case.batched else a for i, a in enumerate(case.args)]
    expected = case.call(*case.args)
    tensors = [Tensor(a, requires_grad=True) for a in args]
    y = case.call(*tensors)
    assert y.ndim == expected.ndim
    y.backward(np.ones(y.shape))
    for tensor in tensors:
        assert tensor.grad.shape == tensor.shape
        if y.size == 0:
            assert not tensor.grad.any()


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide", "power", "maximum", "minimum"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("scalar", [2, 2.0, np.float64(2.0)], ids=["int", "float", "numpy.float64"])
def test_numbers_do_not_widen_tensors(name, dtype, scalar):
    op = getattr(ops, name)
    for swap in (False, True):
        x = Tensor(np.array([0.5, 1.5], dtype), requires_grad=True)
        y = op(scalar, x) if swap else op(x, scalar)
        expected = op(np.full(2, 2, dtype), x.data) if swap else op(x.data, np.full(2, 2, dtype))
        y.sum().backward()
        assert y.dtype == x.grad.dtype == dtype
        np.testing.assert_array_equal(y.data, expected)


def test_wider_arguments_widen_the_value_but_not_the_gradient():
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    y = x * np.full(3, 2.0)
    y.sum().backward()
    assert y.dtype == "float64"
    assert x.grad.dtype == "float32"
