"""Any number of threads computes the same bits; threads of the program, and forked processes, may use them too."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from disttrain import Tensor, env, ops
from disttrain.autodiff.ops import elementwise
from disttrain.errors import ConfigError
from disttrain.kernels import library
from disttrain.optimizers import SGD, Adam

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def threads(instruction_set):
    """Return the function that sets how many threads compute."""
    yield library.native("set_threads")
    library.native("set_threads")(1)


def numbers(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def results():
    """Return what kernels compute that divide their work; sizes for more than a thread, and odd ones."""
    window = {"size": (2, 2), "strides": (1, 2), "padding": ((0, 1), (1, 0))}
    x = numbers(7, 9, 8, 19)
    pooled = ops.max_pool2d(x, **window)
    made = [pooled, ops.average_pool2d(x, **window), elementwise._where_positive(numbers(100_003), numbers(100_003))]
    for strides, c, f in (((2, 1), 17, 40), ((1, 1), 5, 7)):  # directly
        image, kernel, window = (
            numbers(9, 11, 10, c),
            numbers(3, 2, c, f),
            {"strides": strides, "padding": ((1, 0), (0, 1))},
        )
        y = ops.conv2d(image, kernel, numbers(f), activation="relu", **window)
        made += [y, ops.conv2d_input(y, kernel, size=(11, 10), **window)]
        made.append(ops.conv2d_kernel(image, y, size=(3, 2), **window))
    around = {"padding": ((1, 1), (1, 1))}
    image, kernel, g = numbers(2, 19, 22, 17), numbers(3, 3, 17, 33), numbers(2, 19, 22, 33)  # by Winograd's products
    made += [ops.conv2d(image, kernel, **around), ops.conv2d_input(g, kernel, size=(19, 22), **around)]
    made.append(ops.conv2d_kernel(image, g, size=(3, 3), **around))
    made += [ops.matmul(numbers(*a), numbers(*b)) for a, b in [((307, 201), (201, 53)), ((11, 99), (99, 1013))]]
    made += [ops.matmul(numbers(3, 7, 65, 40), numbers(7, 40, 33)), ops.dense(x, numbers(19, 70), numbers(70))]
    rows, labels = numbers(301, 257), np.arange(301) % 257
    x, gamma = Tensor(rows, requires_grad=True), Tensor(numbers(257), requires_grad=True)
    y = ops.layer_norm(ops.gelu(ops.embedding(labels[::-1], x)), gamma, numbers(257), epsilon=1e-3)
    ops.sparse_softmax_cross_entropy(y + ops.softmax(y), labels).sum().backward(retain_graph=True)
    ops.softmax_cross_entropy(y, rows).backward(rows[:, 0])
    many = Tensor(numbers(1201, 33), requires_grad=True)
    z, *moments = ops.batch_norm_of_batch(many, *numbers(2, 33), epsilon=1e-3)
    z.backward(numbers(33, 1201).T.copy())
    made += [z.data, many.grad, *(a.data for a in moments)]
    made += [y.data, x.grad, gamma.grad, ops.sum_to(rows, shape=(257,))]
    heads = [Tensor(numbers(3, 67, 72), requires_grad=True) for _ in range(3)]
    attended = ops.attention_of_heads(*heads, heads=3, causal=True)
    attended.backward(numbers(3, 67, 72))
    made += [attended.data, *(a.grad for a in heads)]
    cell = [Tensor(numbers(*size), requires_grad=True) for size in ((65, 3, 40), (40, 300), (75, 300), (300,))]
    steps = ops.lstm(*cell)
    steps.backward(numbers(65, 3, 75))
    made += [steps.data, *(a.grad for a in cell)]
    for optimizer in (SGD(0.1), SGD(0.1, 0.9), SGD(0.1, 0.9, nesterov=True), Adam(0.1)):
        w = numbers(100_001)
        optimizer.apply([w * 2], [w])
        made.append(w)
    return made


@pytest.mark.parametrize("number", [2, 3, 8])
def test_the_bits_do_not_depend_on_the_number_of_threads(number, threads):
    expected = results()
    threads(number)
    for _ in range(3):
        for got, alone in zip(results(), expected, strict=True):
            np.testing.assert_array_equal(got, alone)


def test_threads_of_the_program_share_them(threads):
    expected = results()
    threads(2)
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda _: results(), range(12)):
            for got, alone in zip(made, expected, strict=True):
                np.testing.assert_array_equal(got, alone)


def test_a_forked_process_starts_its_own(threads):
    threads(2)
    expected = results()
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(a, b) for a, b in zip(results(), expected, strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5"])
def test_no_number_of_threads_is_an_error(asked):
    with pytest.raises(ConfigError, match=rf"DISTTRAIN_THREADS={asked}: expected the number of threads"):
        env.threads({env.THREADS: asked})


def test_a_number_of_threads_is_read():
    assert env.threads({}) is None
    assert env.threads({env.THREADS: "3"}) == 3
