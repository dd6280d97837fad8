"""The kernel of low-rank products gives the definition's bits: hosts without it agree with those that have it."""

import numpy as np
import pytest

from disttrain.data_parallel.compression import power_sgd
from disttrain.kernels import low_rank

SHAPES = [(1, 1, 1), (3, 5, 2), (17, 16, 1), (8, 31, 4), (2, 4097, 3), (300, 33, 2), (0, 4, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_of_outer_products_is_the_definitions_to_the_bit(shape, instruction_set, guarded, monkeypatch):
    rows, columns, rank = shape
    generator = np.random.default_rng(rows)
    p, q, m = (generator.standard_normal(s, np.float32) for s in ((rows, rank), (rank, columns), (rows, columns)))
    m.flat[:2] = np.nan, np.inf
    own = [guarded.new_array(m.shape, shift=shift) for shift in (4, 12)]
    assert low_rank.product(guarded.copy(p), guarded.copy(q, 8), own[0])
    assert low_rank.rest(guarded.copy(m), guarded.copy(p), guarded.copy(q, 8), own[1])
    expected = [np.zeros_like(m), np.zeros_like(m)]
    for kernel in ("product", "rest"):
        monkeypatch.setattr(low_rank, kernel, lambda *arrays: False)
    power_sgd._product(p, q, expected[0])
    power_sgd._rest(m, p, q, expected[1])
    np.testing.assert_array_equal(own[0], expected[0])
    np.testing.assert_array_equal(own[1], expected[1])
