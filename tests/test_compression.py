"""Compressions of gradients, against plain models of their algorithms, and how well a model is trained by them."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.autodiff import Tensor, ops
from disttrain.comm import threads
from disttrain.data_parallel import GradientSum, compression, flatten
from disttrain.data_parallel.compression import Part, top_k
from disttrain.kernels.library import native
from tests.comm import claims

pytestmark = pytest.mark.timeout(60)

# in a bucket: a matrix, a vector, a kernel of a convolution, a matrix too small to be worth it; gaps between them
PARTS = [
    Part(name="dense/kernel", place=slice(0, 600), shape=(30, 20)),
    Part(name="dense/bias", place=slice(608, 628), shape=(20,)),
    Part(name="conv/kernel", place=slice(640, 640 + 3 * 3 * 4 * 16), shape=(3, 3, 4, 16)),
    Part(name="small/kernel", place=slice(1216, 1220), shape=(2, 2)),
]
SIZE = 1232
MATRICES = [PARTS[0], PARTS[2]]
each_world_size = pytest.mark.parametrize("world_size", [1, 2, 3, 4])


def contribution(rank, step):
    """Return gradients of which the largest stand out, as those of a layer do, with zeros between parameters."""
    generator = np.random.default_rng([rank, step])
    flat = np.zeros(SIZE)
    for part in PARTS:
        flat[part.place] = generator.standard_normal(part.place.stop - part.place.start)
    return flat


def summed(world_size, chosen, steps, dtype="float64"):
    """Return, of each rank: the sums of `steps` steps, what it remembers then, guesses, bytes sent in the last."""

    def work(comm):
        carrier = chosen.carrier(PARTS, SIZE, np.dtype(dtype))
        sums = []
        for step in range(steps):
            flat = contribution(comm.rank, step).astype(dtype)
            before = comm.bytes_sent
            comm.start_all_reduce(flat, wire=carrier.wire).wait()
            sums.append(flat)
        sent = comm.bytes_sent - before
        copies = comm.all_gather(np.stack(sums))
        claims.holds(comm, all(copy.tobytes() == copies[0].tobytes() for copy in copies))
        return sums, carrier.memory, carrier.guesses, sent

    return threads.run(world_size, work)


def modelled_power_sgd(world_size, rank, steps, guesses):
    """Return the sums of `steps` steps and the ranks' errors: Vogels et al., algorithms 1 and 2, in float64."""
    guesses = {name: guess.copy() for name, guess in guesses.items()}
    errors = [np.zeros(SIZE) for _ in range(world_size)]
    sums = []
    for step in range(steps):
        given = [contribution(r, step) for r in range(world_size)]
        total = np.sum(given, axis=0)
        for part in MATRICES:
            shape = (-1, part.shape[-1])
            ms = [(g + e)[part.place].reshape(shape) for g, e in zip(given, errors, strict=True)]
            p, _ = np.linalg.qr(sum(m @ guesses[part.name] for m in ms))
            qs = [m.T @ p for m in ms]
            total[part.place] = (p @ sum(qs).T).ravel()
            for error, m, q in zip(errors, ms, qs, strict=True):
                error[part.place] = (m - p @ q.T).ravel()
            guesses[part.name] = sum(qs)
        sums.append(total)
    return sums, errors


@each_world_size
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_power_sgd_is_its_papers_algorithm(world_size, rank):
    chosen = compression.PowerSGD(rank)
    results = summed(world_size, chosen, steps=4)
    expected, errors = modelled_power_sgd(world_size, rank, 4, chosen.carrier(PARTS, SIZE, np.dtype(float)).guesses)
    if world_size == 1:
        expected, errors = [contribution(0, step) for step in range(4)], [np.zeros(SIZE)]
    for number, (sums, memory, _, _) in enumerate(results):
        # P Q' does not depend on the basis of P's columns; 4 steps of float64 with condition numbers below 1e3
        np.testing.assert_allclose(sums, expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(memory, errors[number], rtol=1e-9, atol=1e-9)


@each_world_size
@pytest.mark.parametrize("name", ["int8", "powersgd", "topk"])
def test_nothing_is_lost(world_size, name):
    """What was given is what came out and what is remembered."""
    steps = 5
    results = summed(world_size, compression.get(name), steps)
    given = sum(contribution(rank, step) for rank in range(world_size) for step in range(steps))
    came = np.sum(results[0][0], axis=0) + sum(memory for _, memory, _, _ in results)
    np.testing.assert_allclose(came, given, rtol=0, atol=1e-11)  # float64 sums of some 1e3 numbers below 10


@each_world_size
@pytest.mark.parametrize("ratio", [0.001, 0.05, 0.2, 0.9])
def test_top_k_sums_the_largest_and_keeps_the_others(world_size, ratio):
    steps = 4
    results = summed(world_size, compression.TopK(ratio), steps)
    count = int(np.ceil(ratio * SIZE))
    is_whole = world_size == 1 or count * 12 * world_size >= 2 * SIZE * 8
    memories = [np.zeros(SIZE) for _ in range(world_size)]
    for step in range(steps):
        total = np.zeros(SIZE)
        for rank, memory in enumerate(memories):
            memory += contribution(rank, step)
            sent = np.arange(SIZE) if is_whole else np.argsort(-np.abs(memory))[:count]
            total[sent] += memory[sent]
            memory[sent] = 0
        for sums, _, _, _ in results:
            np.testing.assert_allclose(sums[step], total, rtol=1e-12, atol=1e-12)  # a ring's order, where it is whole
    for (_, memory, _, _), expected in zip(results, memories, strict=True):
        np.testing.assert_array_equal(memory, expected)


@pytest.mark.parametrize("kind", ["normal", "sorted", "equal", "zeros", "in a few", "nan"])
@pytest.mark.parametrize("count", [1, 70, 5000])
def test_the_largest_are_found_however_they_lie(kind, count):
    values = np.abs(np.random.default_rng(count).standard_normal(100_000))
    if kind == "sorted":
        values.sort()
    elif kind == "in a few":
        values[:] = 0
        values[7 : 7 + 3 * count : 3] = 1  # where a sample may miss them
    elif kind == "nan":
        values[1234] = np.nan
    elif kind != "normal":
        values[:] = kind == "equal"
    places = top_k._largest(values, count)
    assert np.unique(places).size == count
    np.testing.assert_array_equal(np.sort(values[places]), np.sort(values)[-count:])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_are_those_of_what_is_sent(world_size):
    sent = [s for _, _, _, s in summed(world_size, compression.PowerSGD(2), steps=2, dtype="float32")]
    elements = 2 * (30 + 20) + 20 + 2 * (36 + 16) + 4
    # two sums around a ring, each of 2 (p-1) chunks that are up to an element longer or shorter than the mean
    assert sum(sent) == 2 * (world_size - 1) * elements * 4
    sent = [s for _, _, _, s in summed(world_size, compression.TopK(0.01), steps=2, dtype="float32")]
    assert sent == [(world_size - 1) * 13 * 8] * world_size


def test_power_sgd_of_a_matrix_of_low_rank_is_exact_from_the_second_step_on():
    generator = np.random.default_rng(3)
    left, right = generator.standard_normal((30, 2)), generator.standard_normal((20, 2))

    def work(comm):
        carrier = compression.PowerSGD(2).carrier(PARTS[:1], 600, np.dtype(np.float32))
        for step in range(2):
            flat = ((left * (1 + step)) @ right.T).astype(np.float32).ravel()
            whole = flat * comm.world_size
            comm.start_all_reduce(flat, wire=carrier.wire).wait()
        # 20 terms of float32 in each of two products
        claims.holds(comm, np.allclose(flat, whole, rtol=0, atol=np.abs(whole).max() * 40 * 2.0**-24))

    threads.run(2, work)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_power_sgd_survives_gradients_of_any_size(scale):
    """Zeros leave no column that is dead for ever, and no square overflows."""

    def work(comm):
        carrier = compression.PowerSGD(2).carrier(PARTS, SIZE, np.dtype(np.float32))
        flat = (contribution(comm.rank, 0) * scale).astype(np.float32)
        comm.start_all_reduce(flat, wire=carrier.wire).wait()
        finite = np.isfinite(flat).all() and np.isfinite(carrier.memory).all()
        carrier.memory[...] = 0
        flat = contribution(comm.rank, 1).astype(np.float32)
        comm.start_all_reduce(flat, wire=carrier.wire).wait()
        claims.holds(comm, finite, np.linalg.matrix_rank(flat[PARTS[0].place].reshape(30, 20).astype(float), 1e-4) == 2)

    threads.run(2, work)


def test_a_part_of_a_bucket_is_summed_as_the_whole_is():
    """Ranks of a node may each carry a slice: rows of a matrix that it cuts travel as they are."""

    def work(comm):
        for name in ("int8", "topk", "powersgd"):
            carrier = compression.get(name).carrier(PARTS, SIZE, np.dtype(float))
            flat = contribution(comm.rank, 0)
            for begin, end in ((0, 333), (333, 900), (900, SIZE)):
                comm.start_all_reduce(flat[begin:end], wire=_At(carrier.wire, begin)).wait()
            left = comm.all_reduce(carrier.memory.copy())
            given = sum(contribution(rank, 0) for rank in range(comm.world_size))
            claims.holds(comm, np.allclose(flat + left, given, rtol=0, atol=1e-11), np.abs(left).max() > 0)
            if name == "powersgd":
                cut = slice(320, 340)  # the row of 20 that 333 lies in
                claims.holds(comm, np.allclose(flat[cut], given[cut]))

    threads.run(2, work)


class _At:
    def __init__(self, wire, begin):
        self.wire, self.begin = wire, begin

    def all_reduce(self, flat, channel):
        return self.wire.all_reduce(flat, channel, self.begin)


@pytest.mark.parametrize("name", ["powersgd", "topk", "int8", "bfloat16"])
def test_compressed_sums_go_on_while_backward_does(name):
    """Buckets under way at once, driven in other orders by each rank, are what they are one after the other."""

    def weights():
        generator = np.random.default_rng(0)
        shapes = [(40, 30), (30,), (30, 20), (20,)]
        return [
            Tensor(generator.standard_normal(shape), requires_grad=True, name=f"w{i}") for i, shape in enumerate(shapes)
        ]

    def work(comm, bucket_bytes):
        w, b, v, c = own = weights()
        sums = GradientSum(comm, flatten(own), bucket_bytes=bucket_bytes, compression=compression.get(name))
        x = np.random.default_rng(comm.rank).standard_normal((5, 40))
        for _ in range(3):
            sums.backward(ops.sum((ops.tanh(Tensor(x) @ w + b) @ v + c) ** 2))
        return len(sums.buckets), [each.grad.copy() for each in own]

    buckets, overlapped = zip(*threads.run(3, work, 1), strict=True)
    assert buckets == (4, 4, 4)
    for gradients in overlapped:
        for ours, theirs in zip(gradients, overlapped[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)


# Convergence: least squares, whose solution is known


def descend(comm, chosen, steps=400):
    """Return how far gradient descent ends from the solution, over the distance that it began with."""
    generator = np.random.default_rng(7)
    solution = generator.standard_normal((24, 16))
    x = np.random.default_rng([1, comm.rank]).standard_normal((64, 24))
    w = Tensor(np.zeros((24, 16)), requires_grad=True, name="w")
    buffers = flatten([w])
    sums = GradientSum(comm, buffers, compression=compression.get(chosen))
    target = x @ solution
    samples = 64 * comm.world_size
    for _ in range(steps):
        sums.backward(ops.sum((Tensor(x) @ w - target) ** 2) / (2 * samples))
        w.data -= 0.1 * w.grad
    return np.linalg.norm(w.data - solution) / np.linalg.norm(solution)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        # The gradient vanishes at the solution, and so do the errors, which are a share of it: each step shrinks the
        # distance by at most 1 - 0.1 * mu * (1 - e) with mu > 0.2 the least eigenvalue of x'x / n (Marchenko & Pastur:
        # (1 - sqrt(24 / 128))**2 = 0.32) and e the relative error: casts 2 * 2**-8, int8 sqrt(256) / 127 / 2.
        ("float16", 0.98**400 * 2),
        ("bfloat16", (1 - 0.02 * (1 - 2.0**-7)) ** 400 * 2),
        ("int8", (1 - 0.02 * 0.93) ** 400 * 2),
        # With error feedback and a share d of the squared norm sent, an error lives for some 1 / d steps (Stich et al.,
        # lemma 3.2): plain descent, but for ten such times. PowerSGD of rank 2 sends at least 2 / 16.
        ("powersgd", 0.98 ** (400 - 10 * 8) * 2),
        (compression.TopK(0.1), 0.98 ** (400 - 10 * 10) * 2),
    ],
    ids=["float16", "bfloat16", "int8", "powersgd", "topk"],
)
@pytest.mark.parametrize("world_size", [2, 4])
def test_least_squares_are_solved(name, bound, world_size):
    ours = threads.run(world_size, descend, name)
    plain = threads.run(world_size, descend, None)
    assert len(set(ours)) == 1
    assert plain[0] < 0.98**400
    assert ours[0] < bound


def test_names_are_known():
    for name in ("float16", "bfloat16", "int8", "powersgd", "topk"):
        assert type(compression.get(name)).__name__.lower() == name
        assert dt.DataParallel(compression=name).compression == name


@pytest.mark.skipif(native("start_all_reduce") is None, reason="no native kernels here: sums go by messages")
@pytest.mark.parametrize("hosts", ["aa", "aab", "aabb"])
@pytest.mark.parametrize("chosen", ["int8", "powersgd", "topk"])
def test_hosts_keep_what_they_did_not_send(chosen, hosts, tmp_path):
    """On one host nothing is lost; on several, what a checkpoint holds is all that is left."""

    def work(comm):
        comm.join_node(hosts[comm.rank])
        w = Tensor(np.zeros((40, 30)), requires_grad=True, name="w")
        sums = GradientSum(comm, flatten([w]), compression=compression.get(chosen))
        came = np.zeros_like(w.data)
        given = np.zeros_like(w.data)
        for step in range(4):
            gradient = np.random.default_rng([comm.rank, step]).standard_normal(w.shape)
            sums.backward(ops.sum(w * gradient))
            came += w.grad
            given += gradient
        kept, guesses = sums.state()
        left = kept.get("w", 0)
        alike = comm.all_gather_json([guess.tobytes().hex() for guess in guesses.values()])
        comm.all_reduce(given)
        # 4 * p float64 additions
        claims.holds(
            comm,
            np.allclose(came + left, given, rtol=0, atol=1e-12),
            (hosts == "aa") == (np.abs(left).max() == 0),
            all(each == alike[0] for each in alike),
        )

    threads.run(len(hosts), work)
