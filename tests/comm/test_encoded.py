"""All-reduces whose messages are encoded, against a plain model of the algorithm."""

from itertools import pairwise

import numpy as np
import pytest

import disttrain as dt
from disttrain.comm import encodings, ring, threads
from disttrain.comm.encoded import Encoded
from disttrain.errors import ConfigError
from disttrain.kernels.library import native
from tests.comm import claims

pytestmark = pytest.mark.timeout(60)

NAMES = ["float16", "bfloat16", "int8"]
each_encoding = pytest.mark.parametrize("name", NAMES)
each_world_size = pytest.mark.parametrize("world_size", range(1, 6))
SIZES = [0, 1, 2, 5, 7, 64, 1003, 70_007]


def contribution(rank, size, step=0, dtype="float32"):
    return np.random.default_rng([rank, size, step]).standard_normal(size).astype(dtype)


def through(name, values):
    """Return `values` as they arrive."""
    encoding = encodings.get(name)
    encoded, arrived = np.zeros(encoding.nbytes(values.size), np.uint8), np.zeros_like(values)
    encoding.encode(values, encoded)
    encoding.decode(encoded, arrived)
    return arrived


def modelled(name, arrays, memories=None):
    """Return the sum of all ranks' `arrays` as the algorithm is meant; `memories` of the ranks change in place."""
    size, ranks = arrays[0].size, len(arrays)
    if ranks == 1 or encodings.get(name).nbytes(size) >= arrays[0].nbytes:
        return np.sum(arrays, axis=0, dtype=arrays[0].dtype)
    bounds = [size * rank // ranks for rank in range(ranks + 1)]
    if memories is not None:
        arrays = [array + memory for array, memory in zip(arrays, memories, strict=True)]
    result = np.zeros_like(arrays[0])
    for owner in range(ranks):
        part = slice(bounds[owner], bounds[owner + 1])
        total = arrays[owner][part].copy()
        for rank in range(ranks):
            if rank != owner:
                arrived = through(name, arrays[rank][part])
                total += arrived
                if memories is not None:
                    memories[rank][part] = arrays[rank][part] - arrived
        result[part] = through(name, total)
        if memories is not None:
            memories[owner][part] = total - result[part]
    return result


@each_encoding
@each_world_size
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_sum_is_the_models_to_the_bit_on_all_ranks(name, world_size, dtype):
    def work(comm):
        for size in SIZES:
            array = contribution(comm.rank, size, dtype=dtype)
            comm.start_all_reduce(array, wire=name).wait()
            expected = modelled(name, [contribution(rank, size, dtype=dtype) for rank in range(world_size)])
            if encodings.get(name).nbytes(size) >= array.nbytes:  # as it is, in the ring's order
                claims.holds(comm, np.allclose(array, expected, rtol=1e-6))
            else:
                claims.holds(comm, np.array_equal(array, expected))

    threads.run(world_size, work)


@each_encoding
@each_world_size
def test_bytes_are_those_of_the_encoding(name, world_size):
    size = 70_007

    def work(comm):
        before = comm.bytes_sent
        comm.start_all_reduce(contribution(comm.rank, size), wire=name).wait()
        return comm.bytes_sent - before

    sent = threads.run(world_size, work)
    bounds = ring.chunk_bounds(size, world_size)
    chunks = [encodings.get(name).nbytes(b - a) for a, b in pairwise(bounds)]
    for rank, nbytes in enumerate(sent):
        # every chunk but the own one to its owner, and the own sum to all others
        assert nbytes == sum(chunks) - chunks[rank] + (world_size - 1) * chunks[rank]


@each_encoding
@each_world_size
def test_memory_keeps_what_was_not_sent(name, world_size):
    size, steps = 1003, 5

    def work(comm):
        wire = Encoded(encodings.get(name), np.zeros(size, np.float32))
        sums = []
        for step in range(steps):
            array = contribution(comm.rank, size, step)
            comm.start_all_reduce(array, wire=wire).wait()
            sums.append(array)
        return sums, wire.memory

    results = threads.run(world_size, work)
    memories = [np.zeros(size, np.float32) for _ in range(world_size)]
    given = [[contribution(rank, size, step) for rank in range(world_size)] for step in range(steps)]
    expected = [modelled(name, arrays, memories) for arrays in given]
    for rank, (sums, memory) in enumerate(results):
        np.testing.assert_array_equal(sums, expected)
        np.testing.assert_array_equal(memory, memories[rank])
    # nothing is lost: what was given is what came out and what is left, but for float32's rounding of some
    # 4 * steps * world_size additions of numbers below 4 * steps * world_size
    left = np.sum(memories, axis=0, dtype=float)
    terms = 4 * steps * world_size
    np.testing.assert_allclose(
        np.sum(expected, axis=0, dtype=float) + left, np.sum(given, axis=(0, 1), dtype=float), atol=terms**2 * 2.0**-24
    )


@each_encoding
def test_sums_under_way_do_not_mix(name):
    def work(comm):
        arrays = [contribution(comm.rank, size) for size in (1003, 5, 0, 20_000)]
        plain = [a.copy() for a in arrays]
        pendings = []
        for a, b in zip(arrays, plain, strict=True):
            pendings += [comm.start_all_reduce(a, wire=name), comm.start_all_reduce(b)]
        for pending in reversed(pendings) if comm.rank else pendings:
            pending.wait()
        return arrays, plain

    for arrays, plain in threads.run(3, work):
        for ours, exact in zip(arrays, plain, strict=True):
            expected = modelled(name, [contribution(rank, ours.size) for rank in range(3)])
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(exact, sum(contribution(rank, ours.size) for rank in range(3)), atol=1e-6)


@pytest.mark.parametrize("array", [np.zeros(5, np.int64), np.zeros(5)])
def test_only_sums_of_floats_are_encoded(array):
    def work(comm):
        op = "max" if array.dtype.kind == "f" else "sum"
        with pytest.raises(ConfigError, match="carries sums of floats"):
            comm.start_all_reduce(array, op, wire="bfloat16")
        with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
            comm.start_all_reduce(np.zeros(5), wire="bflot16")

    threads.run(2, work)
    work(dt.comm.connect("local"))


def test_floats_of_two_bytes_travel_as_they_are():
    def work(comm):
        array = np.full(1000, 1.5, np.float16)
        before = comm.bytes_sent
        comm.start_all_reduce(array, wire="bfloat16").wait()
        claims.holds(comm, (array == 3).all(), comm.bytes_sent - before == 2000)

    threads.run(2, work)


@pytest.mark.skipif(native("start_all_reduce") is None, reason="no native kernels here: sums go by messages")
@each_encoding
@pytest.mark.parametrize("hosts", ["aa", "aab", "aabb"])
def test_what_ranks_of_a_host_sum_in_memory_is_not_rounded(name, hosts):
    """Between hosts travel the encoded sums of each host."""
    size = 5000

    def work(comm):
        comm.join_node(hosts[comm.rank])
        array = comm.allocate(size)
        array[:] = contribution(comm.rank, size)
        before = comm.bytes_sent
        comm.start_all_reduce(array, wire=name).wait()
        return array.copy(), comm.bytes_sent - before

    results = threads.run(len(hosts), work)
    of_host = [
        np.sum(
            [contribution(rank, size) for rank, other in enumerate(hosts) if other == host], axis=0, dtype=np.float32
        )
        for host in sorted(set(hosts))
    ]  # of one or two: no order of sums
    for array, _ in results:
        np.testing.assert_array_equal(array, modelled(name, of_host))
    encoding = encodings.get(name)
    assert sum(sent for _, sent in results) == (len(of_host) - 1) * 2 * 2 * encoding.nbytes(size // 2)
