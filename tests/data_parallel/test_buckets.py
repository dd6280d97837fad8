"""Where gradients are cut into buckets."""

from itertools import pairwise

import numpy as np
import pytest

from disttrain.autodiff import Tensor
from disttrain.comm import threads
from disttrain.data_parallel import GradientSum, flatten
from disttrain.data_parallel import compression as compressions
from disttrain.data_parallel.buckets import by_size, by_timeline, cut


@pytest.mark.parametrize(
    ("sizes", "least", "lengths"),
    [
        ([], 5, []),
        ([1], 5, [1]),
        ([5, 5, 5], 5, [1, 1, 1]),
        ([4, 1, 4, 1, 4], 5, [2, 2, 1]),
        ([1, 9, 1, 1], 5, [2, 2]),
        ([1, 2, 3], 100, [3]),
    ],
)
def test_by_size(sizes, least, lengths):
    assert by_size(sizes, least) == lengths


def end_s(lengths, sizes, final_s, cost_s):
    """Return when the last sum is done, by playing it through."""
    done, at = 0.0, 0
    for length in lengths:
        run = slice(at, at + length)
        done = max(done, *final_s[run]) + cost_s(sum(sizes[run]))
        at += length
    return done


def every_cut(count):
    for ends in np.ndindex(*[2] * (count - 1)):
        places = [0, *(i + 1 for i, is_end in enumerate(ends) if is_end), count]
        yield [last - first for first, last in pairwise(places)]


@pytest.mark.parametrize("alpha_s", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(20))
def test_by_timeline_ends_as_early_as_any_cut(seed, alpha_s):
    generator = np.random.default_rng(seed)
    count = 1 + seed % 8
    sizes = generator.integers(0, 10, count).tolist()
    final_s = generator.uniform(0, 10, count).tolist()  # not in order: a tied weight may be late
    found = by_timeline(sizes, final_s, lambda nbytes: alpha_s + nbytes / 4)
    assert sum(found) == count
    assert min(found) >= 1
    earliest = min(end_s(lengths, sizes, final_s, lambda n: alpha_s + n / 4) for lengths in every_cut(count))
    assert end_s(found, sizes, final_s, lambda n: alpha_s + n / 4) == pytest.approx(earliest, rel=1e-12)


def test_by_timeline_of_nothing():
    assert by_timeline([], [], float) == []


def test_a_cut_covers_each_gradient_once_from_the_last_to_the_first():
    weights = [Tensor(np.ones(size, np.float32), name=f"w{size}") for size in (3, 40, 1, 16)]
    (buffer,) = flatten(weights)
    flat = np.arange(buffer.data.size, dtype=np.float32)
    first, second, third = cut(0, buffer, flat, [1, 2, 1])
    assert [[p.name for p in b.parameters] for b in (first, second, third)] == [["w16"], ["w1", "w40"], ["w3"]]
    assert np.concatenate([third.gradient, second.gradient, first.gradient]).tolist() == flat.tolist()
    assert third.gradient[0] == 0


@pytest.mark.parametrize(("bucket_bytes", "expected"), [(None, [1, 1, 3, 3]), (1 << 22, [1] * 4)])
def test_the_second_steps_timeline_decides_from_the_third_step_on(bucket_bytes, expected):
    def work(comm):
        comm.all_reduce_s = float  # a link on which only the size counts: as many buckets as there are gradients
        weights = [Tensor(np.ones(4, np.float32), requires_grad=True, name=f"w{i}") for i in range(3)]
        sums = GradientSum(comm, flatten(weights), bucket_bytes=bucket_bytes)
        cuts = []
        for step in range(4):
            sums.begin()
            cuts.append(len(sums.buckets))
            for weight in weights[::-1]:
                sums.home(weight)[...] = step
                sums.final(weight)
            sums.finish()
            assert all((weight.grad == 2 * step).all() for weight in weights)
        return cuts

    assert threads.run(2, work) == [expected] * 2


def test_a_compression_that_keeps_something_for_the_next_sum_keeps_its_buckets():
    def work(comm):
        comm.all_reduce_s = float
        weights = [Tensor(np.ones(1000, np.float32), requires_grad=True, name=f"w{i}") for i in range(3)]
        sums = GradientSum(comm, flatten(weights), compression=compressions.get("int8"))
        for _ in range(4):
            sums.begin()
            for weight in weights[::-1]:
                sums.final(weight)
            sums.finish()
        return len(sums.buckets)

    assert threads.run(2, work) == [1] * 2
