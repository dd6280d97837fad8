"""What travels encoded: kernels give the definitions' bits, and the definitions are nearest to what was meant."""

import numpy as np
import pytest

from disttrain.comm import encodings
from disttrain.kernels import casts
from tests.kernels.shapes import LENGTHS

SPECIAL = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519, 65520, -1e5, 2**-24, 2**-25, 3 * 2**-26, 1e-45, 3.4e38, 257 / 256],
    np.float32,
)
# float16: 10 bits behind the point, and half a last place below; bfloat16: 7
PRECISION = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
each_encoding = pytest.mark.parametrize("encoding", [encodings.get(name) for name in ("float16", "bfloat16", "int8")])


def every_kind(length):
    """Return numbers of all exponents, NaN among them, and of usual ones."""
    generator = np.random.default_rng(length)
    bits = generator.integers(0, 1 << 32, length, np.uint32).view(np.float32)
    return np.concatenate([SPECIAL[:length], bits[: length // 2], generator.standard_normal(length, np.float32)])[
        :length
    ]


def assert_same(ours, theirs):
    """Assert equal bits, except of NaN, whose bits mean nothing."""
    np.testing.assert_array_equal(ours, theirs, strict=True)
    np.testing.assert_array_equal(np.signbit(ours[~np.isnan(ours)]), np.signbit(theirs[~np.isnan(theirs)]))


@each_encoding
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", [every_kind, lambda n: np.random.default_rng(n).standard_normal(n, np.float32)])
def test_kernels_give_the_definitions_bits(encoding, length, kind, instruction_set, guarded):
    values = kind(length)
    encoded = guarded.new_array((encoding.nbytes(length),), dtype=np.uint8)
    decoded, added = guarded.copy(np.ones_like(values)), guarded.copy(np.ones_like(values), 12)
    for kernel, given in (
        (casts.encode, (guarded.copy(values), encoded)),
        (casts.decode, (encoded, decoded)),
        (casts.add, (encoded, added)),
    ):
        assert kernel(encoding.name, *given)
    with np.errstate(all="ignore"):
        meant = encoding._encoded(values)
        expected = encoding._decoded(meant, length)
        if not np.isnan(values).any():
            np.testing.assert_array_equal(encoded, meant)
        assert_same(decoded, expected)
        assert_same(added, 1 + expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_cast_is_the_nearest_even_one(name):
    encoding = encodings.get(name)
    values = every_kind(100_000)
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        nearest = encoding._decoded(encoding._encoded(values), values.size)
    if name == "float16":
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(nearest, values.astype(np.float16))
    else:  # of the two numbers that there are around a value, the nearer, or the even one; float64 holds all
        below = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
        above = (below.view(np.uint32) + 0x10000).view(np.float32)
        to_below, to_above = (np.abs(values.astype(float) - each) for each in (below, above))
        ties = to_below == to_above
        even = np.where(below.view(np.uint32) & 0x10000, above, below)
        beyond = ~np.isfinite(above)  # rounds as if there were a number
        expected = np.where(ties, even, np.where(to_below < to_above, below, above))
        np.testing.assert_array_equal(nearest[~beyond], expected[~beyond])
    normal = np.abs(values) < 65504
    normal &= np.abs(values) >= 2.0**-14
    assert (np.abs(nearest - values)[normal] <= PRECISION[name] * np.abs(values)[normal]).all()


def test_a_block_of_int8_is_within_half_a_scale_and_keeps_its_largest():
    encoding = encodings.get("int8")
    values = np.random.default_rng(1).standard_normal(1000, np.float32) * 10.0 ** np.arange(-30, 30).repeat(17)[:1000]
    values = values.astype(np.float32)
    decoded = encoding._decoded(encoding._encoded(values), values.size)
    for start in range(0, values.size, 256):
        block, its = values[start : start + 256], decoded[start : start + 256]
        largest = np.abs(block).max()
        # x * (1 / s) and q * s round 3 times, each by at most 2**-24 of at most 127 scales
        assert np.abs(its - block).max() <= largest / 127 * (0.5 + 127 * 3 * 2.0**-24)
        assert np.abs(its).max() == pytest.approx(largest, rel=2.0**-22)


def test_what_is_not_finite_arrives_as_such():
    for name in ("float16", "bfloat16", "int8"):
        encoding = encodings.get(name)
        values = np.ones(600, np.float32)
        values[[3, 300]] = np.nan, np.inf
        encoded, decoded = np.zeros(encoding.nbytes(600), np.uint8), np.zeros_like(values)
        encoding.encode(values, encoded)
        encoding.decode(encoded, decoded)
        assert not np.isfinite(decoded[[3, 300]]).any()
        np.testing.assert_allclose(decoded[512:], 1, rtol=2.0**-22)  # another block
