"""Batches on any number of ranks, against one rank and against the data themselves."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain import backend
from disttrain.data import Batches
from disttrain.errors import ConfigError, DataError


def numbered(length, **options):
    """Return batches of samples that carry their own index, in x and, negative, in y."""
    index = np.arange(length)
    return Batches(np.stack([index, index], axis=1), -index, **{"seed": 3, **options})


@given(
    length=st.integers(1, 50),
    batch_size=st.integers(1, 60),
    world_size=st.integers(1, 8),
    shuffle=st.booleans(),
    epoch=st.integers(0, 5),
)
def test_ranks_together_read_what_one_rank_reads_and_every_sample_once(length, batch_size, world_size, shuffle, epoch):
    options = {"batch_size": batch_size, "shuffle": shuffle}
    alone = numbered(length, **options)
    ranks = [numbered(length, rank=r, world_size=world_size, **options) for r in range(world_size)]
    read = []
    for step, whole in enumerate(alone.epoch(epoch)):
        parts = [rank.batch(epoch, step) for rank in ranks]
        assert np.array_equal(np.concatenate([part.x for part in parts]), whole.x)
        assert np.array_equal(np.concatenate([part.y for part in parts]), whole.y)
        assert {part.global_size for part in parts} == {len(whole.x)}
        assert [part.first for part in parts] == [
            sum(len(before.x) for before in parts[:rank]) for rank in range(world_size)
        ]
        assert np.array_equal(whole.y, -whole.x[:, 0])
        read += whole.x[:, 0].tolist()
    assert sorted(read) == list(range(length))
    assert {rank.steps_per_epoch for rank in ranks} == {step + 1}


@given(first_step=st.integers(0, 7), world_size=st.integers(1, 4))
def test_an_epoch_resumed_at_a_step_goes_on_as_if_never_left(first_step, world_size):
    options = {"batch_size": 7, "shuffle": True, "rank": world_size - 1, "world_size": world_size}
    whole = list(numbered(45, **options).epoch(4))
    resumed = list(numbered(45, **options).epoch(4, first_step))
    assert len(resumed) == len(whole) - first_step
    for one, other in zip(whole[first_step:], resumed, strict=True):
        assert np.array_equal(one.x, other.x)
        assert (one.first, one.global_size) == (other.first, other.global_size)


def test_the_last_batch_is_as_short_as_what_is_left():
    batches = numbered(10, batch_size=4, shuffle=False, rank=1, world_size=3)
    assert batches.steps_per_epoch == 3
    assert [part.y.tolist() for part in batches.epoch(0)] == [[-2], [-6], [-9]]
    assert [part.global_size for part in batches.epoch(0)] == [4, 4, 2]


def test_a_rank_without_samples_has_an_empty_batch_of_the_right_shape_and_dtype():
    x = np.ones((2, 5, 3))
    part = Batches(x, batch_size=8, shuffle=True, seed=0, rank=3, world_size=4).batch(0, 0)
    assert part.x.shape == (0, 5, 3)
    assert part.x.dtype == np.float32
    assert part.y is None
    assert (part.first, part.global_size) == (2, 2)


def test_without_shuffle_the_order_is_that_of_the_data_and_with_it_each_epoch_has_another():
    plain = numbered(30, batch_size=30, shuffle=False)
    assert plain.batch(5, 0).y.tolist() == list(range(0, -30, -1))
    shuffled = numbered(30, batch_size=30, shuffle=True)
    orders = {tuple(shuffled.batch(epoch, 0).y.tolist()) for epoch in range(5)}
    assert len(orders | {tuple(plain.batch(0, 0).y.tolist())}) == 6


@pytest.mark.parametrize("floatx", ["float16", "float32", "float64"])
def test_floats_become_floatx_and_everything_else_stays(floatx):
    before = backend.floatx()
    backend.set_floatx(floatx)
    try:
        for dtype in ("float16", "float32", "float64", "uint8", "int64", "bool"):
            data = np.ones((3, 2), dtype)
            part = Batches(data, data, batch_size=2, shuffle=True, seed=0).batch(0, 0)
            expected = floatx if dtype.startswith("float") else dtype
            assert part.x.dtype == part.y.dtype == expected
    finally:
        backend.set_floatx(before)


def test_the_data_are_not_copied_as_a_whole():
    x = np.zeros((10, 2))
    assert Batches(x, batch_size=2, shuffle=True, seed=0).x is x


def test_lists_serve_as_data():
    part = Batches([[1, 2], [3, 4]], [0.5, 1.5], batch_size=2, shuffle=False, seed=0).batch(0, 0)
    assert part.x.tolist() == [[1, 2], [3, 4]]
    assert part.y.tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((5, 2)), np.zeros(4), "x has 5 samples and y has 4"),
        (np.zeros((0, 2)), None, r"x has no samples: its shape is \(0, 2\)"),
        (np.zeros((2, 2)), np.float64(1), "y has no samples"),
        (np.array(["a", "b"]), None, "x must be made of numbers, and its dtype is <U1"),
        (np.zeros(2), [None, 1], "y must be made of numbers, and its dtype is object"),
        ([[1, 2], [3]], None, "x is not an array: its samples differ in shape"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused_by_name(x, y, message):
    with pytest.raises(DataError, match=message):
        Batches(x, y, batch_size=1, shuffle=False, seed=0)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "8", True, None])
def test_a_batch_size_that_is_no_positive_integer_is_refused(batch_size):
    with pytest.raises(ConfigError, match="batch_size must be"):
        numbered(4, batch_size=batch_size, shuffle=False)


def test_a_rank_or_a_step_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="rank 2 of world_size 2"):
        numbered(4, batch_size=2, shuffle=False, rank=2, world_size=2)
    batches = numbered(4, batch_size=2, shuffle=False)
    for step in (-1, 2):
        with pytest.raises(ConfigError, match="one of the 2 of an epoch"):
            batches.batch(0, step)
    assert list(batches.epoch(0, first_step=2)) == []
    for step in (-1, 3):
        with pytest.raises(ConfigError, match="first_step must be from 0 to 2"):
            next(batches.epoch(0, first_step=step))


def test_a_batch_of_data_that_are_not_contiguous_costs_no_copy_of_all():
    x = np.broadcast_to(np.arange(4, dtype=np.float32), (10_000_000, 4))  # 160 MB, if it were
    batches = Batches(x, batch_size=5, shuffle=True, seed=0)
    batches.batch(0, 0)
    tracemalloc.start()
    batch = batches.batch(0, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(batch.x, x[:5])
    assert peak < 1 << 20
