"""Sharding and the order of samples, against brute force and the laws of chance."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from disttrain.data.shard import _mix, batch_positions, permute, shard
from disttrain.errors import ConfigError

SEEDS = st.integers(0, 2**64 - 1)


def order(length, *, seed=0, epoch=0):
    return permute(np.arange(length), length, seed=seed, epoch=epoch)


@given(length=st.integers(0, 100), world_size=st.integers(1, 12))
def test_shards_cover_every_place_once_in_order_of_ranks_and_are_of_almost_one_length(length, world_size):
    places = list(range(length))
    parts = [places[shard(length, rank, world_size)] for rank in range(world_size)]
    assert list(itertools.chain(*parts)) == places
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("length", "rank", "world_size"), [(5, 2, 2), (5, -1, 2), (-1, 0, 1), (5, 0, 0)])
def test_a_shard_that_cannot_be_is_refused(length, rank, world_size):
    with pytest.raises(ConfigError):
        shard(length, rank, world_size)


@given(length=st.integers(1, 60), batch_size=st.integers(1, 70))
def test_batches_of_positions_follow_one_another_through_the_epoch(length, batch_size):
    steps = -(-length // batch_size)
    batches = [batch_positions(step, batch_size, length) for step in range(steps)]
    assert list(itertools.chain(*batches)) == list(range(length))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    for step in (-1, steps):
        with pytest.raises(ConfigError, match="step"):
            batch_positions(step, batch_size, length)


@given(length=st.integers(0, 600), seed=SEEDS, epoch=st.integers(0, 1000))
@example(length=1, seed=0, epoch=0)
@example(length=2, seed=0, epoch=0)
@example(length=3, seed=0, epoch=0)
@example(length=65536, seed=1, epoch=2)
@example(length=65537, seed=1, epoch=2)
@example(length=60000, seed=1, epoch=2)
@example(length=10007, seed=1, epoch=2)
def test_an_order_has_every_sample_exactly_once(length, seed, epoch):
    samples = order(length, seed=seed, epoch=epoch)
    assert samples.dtype == np.int64
    assert np.array_equal(np.sort(samples), np.arange(length))


@given(data=st.data(), length=st.integers(1, 2**40), seed=SEEDS)
@example(data=None, length=2**40, seed=7)
def test_a_position_has_the_same_sample_whatever_it_is_asked_together_with(data, length, seed):
    if data is None:
        positions = [0, length - 1, length // 2]
    else:
        positions = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20, unique=True))
    together = permute(np.array(positions), length, seed=seed, epoch=3)
    alone = [int(permute(np.array(p), length, seed=seed, epoch=3)) for p in positions]
    assert together.tolist() == alone
    assert len(set(alone)) == len(positions)
    assert all(0 <= sample < length for sample in alone)


def test_orders_of_other_epochs_and_seeds_have_nothing_in_common():
    # Two random orders agree at Poisson(1) places: at more than 9 once in ten million times.
    orders = [order(5000, seed=s, epoch=e) for s in (0, 1, 2**63) for e in (0, 1, 2)]
    for one, other in itertools.combinations(orders, 2):
        assert np.count_nonzero(one == other) <= 9


def test_the_order_is_the_same_in_every_version():
    # Resuming from a checkpoint, and the split of house_prices, rely on it.
    assert order(12, seed=1, epoch=2).tolist() == [4, 8, 0, 7, 9, 2, 3, 6, 11, 5, 10, 1]
    digest = hashlib.sha256(order(60000, seed=1, epoch=2).astype("<i8").tobytes()).hexdigest()
    assert digest == "c316fd1b895e3a03cfe5f3c03931d49a8a85140f74935b62e126009aebdd0321"


def test_a_row_can_be_added_to_mixed_bits_without_wrapping_around():
    # Two cells would seldom meet, and no test of small orders would see it.
    mixed = _mix(np.arange(100_000, dtype=np.uint32))
    assert mixed.dtype == np.uint32
    assert 2**30 < mixed.max() < 2**31


def chi_square(counts):
    expected = np.mean(counts)
    return float(np.sum((counts - expected) ** 2) / expected)


# Bounds are the 99.99 % points of chi-square; the seeds are fixed, so that a test passes always or never.
@pytest.mark.parametrize(("length", "bound"), [(7, 27.9), (10, 33.8), (100, 160.1)])
@pytest.mark.parametrize("by", ["seed", "epoch"])
def test_the_first_sample_is_any_one_equally_often(length, bound, by):
    first = [int(permute(0, length, **{"seed": 0, "epoch": 0, by: key})) for key in range(4000)]
    assert chi_square(np.bincount(first, minlength=length)) < bound


@pytest.mark.parametrize(("length", "bound"), [(4, 57.1), (5, 185.1)])
def test_every_order_of_a_few_samples_comes_equally_often(length, bound):
    counts = Counter(tuple(order(length, seed=seed).tolist()) for seed in range(4000))
    every = itertools.permutations(range(length))
    assert chi_square(np.array([counts[one] for one in every])) < bound


@pytest.mark.parametrize("length", [10_000, 16_384, 16_385])
def test_neighbours_do_not_stay_together(length):
    samples = order(length, seed=3)
    # Of n pairs about 2 are neighbours, as Poisson(2); 13 and more come once in ten million times.
    assert np.count_nonzero(np.abs(np.diff(samples)) == 1) <= 12
    # Correlations of a random order have a standard deviation of 1/sqrt(n).
    for lag in (1, 2, 100, 128):
        assert abs(np.corrcoef(samples[:-lag], samples[lag:])[0, 1]) < 5 / np.sqrt(length)
    assert abs(np.corrcoef(samples, np.arange(length))[0, 1]) < 5 / np.sqrt(length)


def test_a_batch_draws_from_the_whole_data_set():
    # The mean of 100 of 10,000 has a standard deviation of 289.
    means = order(10_000, seed=5).reshape(100, 100).mean(axis=1)
    assert np.all(np.abs(means - 4999.5) < 5 * 289)
    assert 200 < np.std(means) < 400


@pytest.mark.parametrize(
    ("positions", "length"),
    [([3], 3), ([-1], 3), ([0.0], 3), ([0], 0), ([0], 2**40 + 1), ([], -1)],
)
def test_a_position_that_cannot_be_is_refused(positions, length):
    with pytest.raises(ConfigError):
        permute(np.array(positions), length, seed=0, epoch=0)


def test_the_shape_of_positions_is_kept():
    assert permute(np.arange(6).reshape(2, 3), 6, seed=0, epoch=0).shape == (2, 3)
    assert permute(np.empty((0, 2), int), 6, seed=0, epoch=0).shape == (0, 2)
