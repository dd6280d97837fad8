"""Matrix products by matrix units, computed by a model of them: this has not been run on a CPU with AMX.

The model in C++ (cpu/tiles.h) is compared with another in NumPy, to the bit, and products with float64.
"""

import itertools

import numpy as np
import pytest

import disttrain as dt
from disttrain.kernels import library, precision
from disttrain.kernels import matmul as kernels
from disttrain.kernels.build import BuildError, build
from disttrain.kernels.instruction_sets import InstructionSet, cpu_flags, runnable
from tests.kernels.shapes import PRODUCTS

UNIT = 2.0**-24  # of rounding to float32
PARTS = {"highest": 3, "high": 2, "medium": 1}
EVERY_PRECISION = pytest.mark.parametrize("name", PARTS)
ALL_ONES = np.uint32(0x7FFFFFFF).view(np.float32)  # a NaN that rounding its bits would turn into -0
SMALL = [(1, 1, 1), (16, 16, 32), (17, 33, 31), (3, 40, 65), (33, 2, 100)]
EVERY_SMALL = pytest.mark.parametrize("shape", SMALL, ids=str)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Compute with the model of tiles; skips where vectors are too short for them."""
    avx512 = next((each for each in runnable(cpu_flags()) if each.name == "avx512"), None)
    if avx512 is None:
        pytest.skip("tiles need AVX-512 beside them")
    emulated = InstructionSet(
        name="emulated", flags=avx512.flags, options=(*avx512.options, "-DDISTTRAIN_EMULATE_TILES")
    )
    try:
        functions = library.load(build(emulated))
    except BuildError as error:
        pytest.skip(f"no kernels here: {error}")
    monkeypatch.setattr(library, "chosen", lambda: library.Choice(name="emulated", functions=functions))
    monkeypatch.setattr(precision, "_chosen", "")


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def parts_of(x, count):
    """Return `x` as a list of float32 arrays of numbers that bfloat16 holds."""
    parts = []
    for _ in range(count):
        bits = x.view(np.uint32)
        part = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        parts.append(part)
        x = x - part
    return parts


def added(sums, a, b):
    """Return `sums` plus ``a @ b``, 32 terms, as Intel describes TDPBF16PS."""
    halves = np.zeros((2, *sums.shape), np.float32)
    for p in range(16):
        for odd in (0, 1):
            # exact in float64 but for the addition, which is rounded to 53 bits before 24
            exact = halves[odd].astype(float) + np.outer(a[:, 2 * p + odd].astype(float), b[2 * p + odd])
            halves[odd] = exact.astype(np.float32)
    return sums + (halves[0] + halves[1])


def by_tiles(a, b, parts):
    """Return ``a @ b`` of float32 by tiles."""
    (m, k), n = a.shape, b.shape[1]
    wide = -(-k // 32) * 32
    left, right = np.zeros((m, wide), np.float32), np.zeros((wide, n), np.float32)
    left[:, :k], right[:k] = a, b
    left, right = parts_of(left, parts), parts_of(right, parts)
    order = {1: [(0, 0)], 2: [(1, 0), (0, 1), (0, 0)], 3: [(2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)]}[parts]
    sums = np.zeros((m, n), np.float32)
    for p in range(0, wide, 32):
        for i, j in order:
            sums = added(sums, left[i][:, p : p + 32], right[j][p : p + 32])
    return sums


def computed(kernel, *arrays, **attributes):
    return kernel(*arrays, **attributes).run()


@EVERY_PRECISION
@EVERY_SMALL
def test_products_are_those_of_the_model_to_the_bit(name, shape, guarded):
    m, n, k = shape
    dt.set_matmul_precision(name)
    a, b = numbers(m, k), numbers(k, n, seed=1)
    expected = by_tiles(a, b, PARTS[name])
    for turn_a, turn_b in itertools.product((False, True), repeat=2):
        left = guarded.copy(a.T).T if turn_a else guarded.copy(a)
        right = guarded.copy(b.T).T if turn_b else guarded.copy(b)
        np.testing.assert_array_equal(computed(kernels.matmul, left, right), expected)
    apart = guarded.copy(np.repeat(np.repeat(a, 2, 0), 3, 1))[::2, ::3]
    np.testing.assert_array_equal(computed(kernels.matmul, apart, b), expected)
    bias = guarded.copy(numbers(n))
    np.testing.assert_array_equal(
        computed(kernels.dense, a, b, bias, activation="relu"), np.maximum(expected + bias, 0)
    )


@EVERY_PRECISION
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_are_as_exact_as_asked_for(name, shape):
    m, n, k = shape
    dt.set_matmul_precision(name)
    a, b = numbers(m, k), numbers(k, n, seed=1)
    got = computed(kernels.matmul, a, b)
    sizes = np.abs(a).astype(float) @ np.abs(b)
    # left out of a product: see cpu/matmul_amx.cpp; the products of parts add up to 1.02 |a| |b| at most
    left_out = {"highest": 2.0**-23 + 2.0**-32, "high": 3 * 2.0**-16 + 2.0**-24, "medium": 2 * 2.0**-8 + 2.0**-16}[name]
    # an element's roundings: 16 products one after the other, two sums, and one sum for each tile of 32 terms
    roundings = 18 + {"highest": 6, "high": 3, "medium": 1}[name] * -(-k // 32)
    bound = (left_out + 1.02 * roundings * UNIT / (1 - roundings * UNIT)) * sizes
    assert (np.abs(got - a.astype(float) @ b) <= bound).all()


def test_each_precision_is_worse_than_the_one_above_and_the_highest_as_good_as_float32():
    a, b = numbers(64, 512), numbers(512, 64, seed=1)
    exact = a.astype(float) @ b
    error = {"float32": np.linalg.norm(a @ b - exact)}
    for name in PARTS:
        dt.set_matmul_precision(name)
        error[name] = np.linalg.norm(computed(kernels.matmul, a, b) - exact)
    # in the mean over 4096 sums both are errors of float32 sums; what is left out of them is on average much less
    assert error["highest"] < 1.5 * error["float32"]
    assert error["highest"] * 4 < error["high"] < error["medium"] / 64


@EVERY_PRECISION
def test_the_bits_of_an_element_follow_from_its_row_and_its_column_alone(name):
    dt.set_matmul_precision(name)
    a, b = numbers(40, 70), numbers(70, 35, seed=1)
    a[3, 5] = b[1, 2] = np.inf
    whole = computed(kernels.matmul, a, b)
    for i, j in itertools.product((0, 3, 31, 32, 39), (0, 2, 16, 34)):
        assert computed(kernels.matmul, a[i : i + 1], b).tobytes() == whole[i].tobytes()
        assert computed(kernels.matmul, a[i:], b[:, j:]).tobytes() == whole[i:, j:].tobytes()


@EVERY_PRECISION
@pytest.mark.parametrize("value", [np.nan, ALL_ONES, np.inf, -np.inf, 3.4e38])
def test_what_no_bfloat16_holds_reaches_what_it_reaches_in_the_definition(name, value):
    dt.set_matmul_precision(name)
    for in_a in (True, False):
        a, b = numbers(20, 40), numbers(40, 37, seed=1)
        if in_a:
            a[7, 9] = value
        else:
            b[9, 7] = value
        b[9, 0] = 0
        with np.errstate(invalid="ignore", over="ignore"):
            expected = a @ b
        got = computed(kernels.matmul, a, b)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
        np.testing.assert_array_equal(got[np.isinf(got)], expected[np.isinf(got)])


@EVERY_PRECISION
def test_denormal_numbers_count_as_zero_and_nothing_is_read_behind(name, guarded):
    dt.set_matmul_precision(name)
    a = np.full((3, 5), 2.0**-130, np.float32)
    got = computed(kernels.matmul, guarded.copy(a), guarded.copy(np.full((5, 4), 2.0**100, np.float32)))
    np.testing.assert_array_equal(got, 0)


@EVERY_PRECISION
def test_empty_products_are_their_bias(name):
    dt.set_matmul_precision(name)
    bias = numbers(6)
    for m, k in [(5, 0), (0, 3)]:
        got = computed(kernels.dense, numbers(m, k), numbers(k, 6), bias)
        np.testing.assert_array_equal(got, np.zeros((m, 6), np.float32) + bias)
