"""Flat buffers, and gradients that are summed bucket by bucket while backward runs."""

import logging

import numpy as np
import pytest

import disttrain as dt
from disttrain.autodiff import Tensor, ops
from disttrain.comm import threads
from disttrain.data_parallel import GradientSum, flatten, total_over

pytestmark = pytest.mark.timeout(30)

SHAPES = [(7, 5), (5,), (5, 3), (3,), ()]


def parameters(dtype="float64", shapes=SHAPES):
    """Return the weights of a small net, the same on all ranks."""
    generator = np.random.default_rng(3)
    return [
        Tensor(generator.normal(size=shape).astype(dtype), requires_grad=True, name=f"w{i}")
        for i, shape in enumerate(shapes)
    ]


def inputs(rank, dtype="float64"):
    return np.random.default_rng(100 + rank).normal(size=(rank + 2, 7)).astype(dtype)


def loss_of(weights, x):
    w, b, v, c, scale = weights
    return ops.sum((ops.tanh(Tensor(x) @ w + b) @ v + c) ** 2 * scale)


def sum_of_gradients(world_size, dtype="float64"):
    """Return the gradients of the sum of all ranks' losses, from autodiff on one worker alone."""
    weights = parameters(dtype)
    for rank in range(world_size):
        loss_of(weights, inputs(rank, dtype)).backward()  # adds to `grad`
    return [w.grad for w in weights]


def assert_gradients(weights, expected, tolerance=1e-12):
    for weight, gradient in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight.grad, gradient, rtol=tolerance, atol=tolerance, err_msg=weight.name)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 1 << 22])
def test_gradients_are_those_of_the_sum_over_ranks(world_size, bucket_bytes):
    def work(comm):
        weights = parameters()
        sums = GradientSum(comm, flatten(weights), bucket_bytes=bucket_bytes)
        for _ in range(2):  # the second time into the same buffers: nothing is added up from before
            sums.backward(loss_of(weights, inputs(comm.rank)))
        return weights, len(sums.buckets)

    expected = sum_of_gradients(world_size)
    for weights, buckets in threads.run(world_size, work):
        assert buckets == {1: 5, 200: 2, 1 << 22: 1}[bucket_bytes]
        assert_gradients(weights, expected)


def test_a_bucket_starts_while_backward_still_runs():
    # the last layer's bucket is under way when the first layer's gradient is still to come
    seen = []

    def work(comm):
        weights = parameters()
        sums = GradientSum(comm, flatten(weights), bucket_bytes=1)
        deliver = sums.deliver

        def watched(parameter, gradient):
            deliver(parameter, gradient)
            seen.append((parameter.name, [b.pending is not None for b in sums.buckets]))

        sums.deliver = watched
        sums.backward(loss_of(weights, inputs(0)))

    threads.run(1, work)
    started = dict(seen)
    assert started["w3"] == [True, True, False, False, False]
    assert started["w0"] == [True] * 5


def test_buckets_start_in_the_same_order_whichever_gradient_is_final_first():
    # ranks that use their weights in another order, as control flow that depends on data may bring about
    def work(comm):
        weights = parameters(shapes=[(3,)] * 4)
        sums = GradientSum(comm, flatten(weights), bucket_bytes=1)
        start, order = comm.start_all_reduce, []

        def recorded(array, op="sum", **options):
            order.append(next(i for i, b in enumerate(sums.buckets) if b.gradient is array))
            return start(array, op, **options)

        comm.start_all_reduce = recorded
        used = weights if comm.rank == 0 else weights[::-1]
        x = Tensor(np.full(3, 2.0))
        for weight in used:
            x = x * weight
        sums.backward(ops.sum(x))
        return order, [w.grad.copy() for w in weights]

    results = threads.run(3, work)
    values = [w.data for w in parameters(shapes=[(3,)] * 4)]
    expected = [3 * 2 * np.prod(values, axis=0) / value for value in values]
    for order, gradients in results:
        assert order == [0, 1, 2, 3]
        np.testing.assert_allclose(gradients, expected, rtol=1e-13)


def test_an_unused_parameter_has_a_gradient_of_zero_and_is_named_once(caplog):
    def work(comm):
        weights = parameters()
        sums = GradientSum(comm, flatten(weights), bucket_bytes=1)
        for weight in weights:
            sums._view_of[weight][...] = 7.0  # what another step left there
        for _ in range(2):
            sums.backward(ops.sum(weights[0]) + ops.sum(weights[2] * 2))
        return [w.grad for w in weights]

    with caplog.at_level(logging.WARNING, logger="disttrain"):
        gradients = threads.run(2, work)[1]
    for gradient, value in zip(gradients, [2, 0, 4, 0, 0], strict=True):
        np.testing.assert_array_equal(gradient, np.full(gradient.shape, value))
    text = "the loss does not depend on w1, w3, w4; these parameters get no gradient"
    assert [record.message for record in caplog.records] == [text] * 2  # once by each rank


def test_a_parameter_that_one_rank_alone_uses_still_gets_its_gradient(caplog):
    def work(comm):
        weights = parameters(shapes=[(2,), (2,)])
        sums = GradientSum(comm, flatten(weights), bucket_bytes=1)
        loss = ops.sum(weights[0]) if comm.rank else ops.sum(weights[0] * weights[1])
        sums.backward(loss)
        return [w.grad for w in weights]

    w0, w1 = (w.data for w in parameters(shapes=[(2,), (2,)]))
    for first, second in threads.run(2, work):
        np.testing.assert_array_equal(first, w1 + 1)
        np.testing.assert_array_equal(second, w0)
    assert "does not depend on w1;" in caplog.text


def test_a_parameter_used_twice_gets_both_gradients():
    def work(comm):
        weights = parameters(shapes=[(3, 3)])
        sums = GradientSum(comm, flatten(weights))
        sums.backward(ops.sum(weights[0] @ weights[0]) + ops.sum(weights[0]))
        return weights

    w = parameters(shapes=[(3, 3)])[0].data
    ones = np.ones((3, 3))
    for weights in threads.run(3, work):
        assert_gradients(weights, [3 * (ones @ w.T + w.T @ ones + 1)])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_parameters_and_gradients_are_views_aligned_to_64_bytes(dtype):
    weights = parameters(dtype)
    before = [w.data.copy() for w in weights]
    (buffer,) = flatten(weights)
    with dt.comm.use(dt.comm.connect("local")) as comm:
        sums = GradientSum(comm, [buffer])
        sums.backward(loss_of(weights, inputs(0, dtype)))
    (gradient,) = sums.flat
    taken = np.zeros(buffer.data.size, bool)
    for weight, value in zip(weights, before, strict=True):
        np.testing.assert_array_equal(weight.data, value, strict=True)
        assert weight.grad.shape == weight.shape
        for view, flat in ((weight.data, buffer.data), (weight.grad, gradient)):
            assert np.shares_memory(view, flat)
            assert view.ctypes.data % 64 == 0
    for _, place in buffer.places:
        assert not taken[place].any()
        taken[place] = True
    assert (gradient[~taken] == 0).all()
    assert (buffer.data[~taken] == 0).all()
    split = buffer.split(gradient)
    assert list(split) == [w.name for w in weights]
    assert all(np.shares_memory(split[w.name], w.grad) for w in weights)


def test_each_dtype_has_a_buffer_of_its_own():
    def work(comm):
        weights = [*parameters("float32"), Tensor(np.ones(3), requires_grad=True, name="wide")]
        buffers = flatten(weights)
        sums = GradientSum(comm, buffers)
        sums.backward(loss_of(weights[:5], inputs(comm.rank, "float32")).astype("float64") + ops.sum(weights[5]))
        return [b.data.dtype.name for b in buffers], weights

    for dtypes, weights in threads.run(2, work):
        assert dtypes == ["float32", "float64"]
        # float32 sums of 10 terms
        assert_gradients(weights[:5], sum_of_gradients(2, "float32"), tolerance=1e-5)
        np.testing.assert_array_equal(weights[5].grad, np.full(3, 2.0), strict=True)


@pytest.mark.parametrize("empty", [[], [(0, 4)], [(0,), (3,)], [(3,), (0,)]])
def test_empty_parameters_and_none_at_all(empty):
    def work(comm):
        weights = parameters(shapes=empty)
        sums = GradientSum(comm, flatten(weights), bucket_bytes=1)
        loss = Tensor(np.array(0.0))
        for weight in weights:
            loss = loss + ops.sum(weight)
        sums.backward(loss)
        return [w.grad for w in weights]

    for gradients in threads.run(2, work):
        assert [g.shape for g in gradients] == empty
        assert all((g == 2).all() for g in gradients)


def test_a_loss_that_depends_on_nothing_gives_zeros(caplog):
    def work(comm):
        weights = parameters(shapes=[(2,)])
        GradientSum(comm, flatten(weights)).backward(Tensor(np.array(1.0)))
        return weights[0].grad

    assert [g.tolist() for g in threads.run(2, work)] == [[0, 0]] * 2
    assert "does not depend on w0" in caplog.text


def test_a_loss_that_is_a_parameter_itself():
    def work(comm):
        weights = parameters(shapes=[(), (2,)])
        GradientSum(comm, flatten(weights), bucket_bytes=1).backward(weights[0])
        return [w.grad.tolist() for w in weights]

    assert threads.run(3, work) == [[3.0, [0.0, 0.0]]] * 3


def test_a_leaf_of_the_user_s_own_gets_its_rank_s_gradient():
    def work(comm):
        weights, own = parameters(shapes=[(2,)]), Tensor(np.ones(2) + comm.rank, requires_grad=True)
        GradientSum(comm, flatten(weights)).backward(ops.sum(weights[0] * own))
        return weights[0].grad.tolist(), own.grad

    value = parameters(shapes=[(2,)])[0].data
    for of_parameter, of_own in threads.run(2, work):
        assert of_parameter == [3, 3]
        np.testing.assert_array_equal(of_own, value)


def test_the_sum_over_ranks_is_differentiable():
    # f(a, b) = (a + b)**2 on both ranks: the sum of losses is 2 (a + b)**2
    def work(comm):
        x = Tensor(np.array([comm.rank + 1.0]), requires_grad=True, name="x")
        total = total_over(comm)
        ops.sum(total(x) ** 2).backward()
        array = np.array([comm.rank + 1.0])
        return x.grad.tolist(), total(array).tolist(), array.tolist()

    assert threads.run(2, work) == [([12.0], [3.0], [1.0]), ([12.0], [3.0], [2.0])]
