"""Random numbers that do not depend on who draws them; the default float type; the seed."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest

from disttrain import Tensor, backend
from disttrain.errors import ConfigError


@pytest.fixture(autouse=True)
def _defaults():
    yield
    backend.set_random_seed(0)
    backend.set_floatx("float32")


@pytest.mark.parametrize("per_sample", [0, 1, 7, 8, 9, 64])
@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 12), (3, 4), (5, 12), (7, 7)])
def test_the_bits_of_a_part_are_a_slice_of_the_whole(per_sample, start, end):
    whole = backend.sample_bits(1, "mask", 2, first=100, samples=12, per_sample=per_sample)
    part = backend.sample_bits(1, "mask", 2, first=100 + start, samples=end - start, per_sample=per_sample)
    assert (whole.dtype, whole.shape, part.shape) == ("uint32", (12, per_sample), (end - start, per_sample))
    np.testing.assert_array_equal(part, whole[start:end])


KEYS = [
    (),
    (0,),
    (1,),
    (0, 1),
    (1, 0),
    (10,),
    ("1",),
    ("a", 1),
    ("a1",),
    ("a", "1"),
    ("a/b",),
    ("a", "b"),
    (0, "dropout", "d", 3),
]


def test_different_keys_give_different_bits():
    drawn = {backend.sample_bits(*key, first=0, samples=1, per_sample=4).tobytes() for key in KEYS}
    assert len(drawn) == len(KEYS)


def test_a_key_of_numpys_numbers_is_the_key_of_pythons():
    """A step that comes out of an array must not draw another mask."""
    ours, theirs = backend.philox(1, "x"), backend.philox(np.int64(1), np.str_("x"))
    np.testing.assert_array_equal(ours.random_raw(4), theirs.random_raw(4))


def test_the_same_key_gives_the_same_bits_in_another_process():
    code = "from disttrain import backend; print(backend.philox(1, 'a').random_raw(3).tolist())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert there.stdout.strip() == str(backend.philox(1, "a").random_raw(3).tolist())


def test_the_bits_are_those_of_numpys_philox_at_a_counter():
    """The key is a hash of type and value: written down here, because changing it would change every result."""
    words = np.frombuffer(hashlib.blake2b(b"int:5\x1fstr:mask", digest_size=16).digest(), "<u8")
    raw = np.random.Philox(key=words, counter=6).random_raw(4)  # sample 3 of two blocks each begins at block 6
    got = backend.sample_bits(5, "mask", first=3, samples=1, per_sample=16)
    np.testing.assert_array_equal(got[0, :8], raw.view(np.uint32))


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(shift):
    """Chi-square of 256 cells, 255 degrees of freedom: mean 255, variance 510; six deviations."""
    n = 256 * 400
    bits = backend.sample_bits("chi", first=0, samples=n // 64, per_sample=64)
    counts = np.bincount((bits.ravel() >> shift) & 255, minlength=256)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_square - 255) < 6 * math.sqrt(510)


def test_neighbouring_words_samples_and_keys_are_independent():
    """Pairs of the highest two bits fall into 16 cells alike: 15 degrees of freedom, variance 30."""
    n = 16 * 1000
    bits = backend.sample_bits("pairs", 0, first=0, samples=n // 16 + 1, per_sample=16) >> 30
    other = backend.sample_bits("pairs", 1, first=0, samples=n // 16 + 1, per_sample=16) >> 30
    pairs = {
        "samples": (bits[:-1], bits[1:]),
        "keys": (bits[:-1], other[:-1]),
        "words": (bits[:-1], np.roll(bits[:-1], 1, 1)),
    }
    for name, (a, b) in pairs.items():
        counts = np.bincount((4 * a + b).ravel(), minlength=16)
        chi_square = ((counts - n / 16) ** 2 / (n / 16)).sum()
        assert abs(chi_square - 15) < 6 * math.sqrt(30), name


def test_generators_are_numpys_over_the_same_bits():
    np.testing.assert_array_equal(
        backend.random_generator(3, "w").standard_normal(5),
        np.random.Generator(backend.philox(3, "w")).standard_normal(5),
    )


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, np.int64(7)])
def test_seeds_are_integers_of_64_bits(seed):
    backend.set_random_seed(seed)
    assert backend.seed() == seed
    assert type(backend.seed()) is int


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, 1.0, "1", None])
def test_other_seeds_are_an_error_that_leaves_the_old_one(seed):
    backend.set_random_seed(5)
    with pytest.raises(ConfigError, match="seed must be an integer"):
        backend.set_random_seed(seed)
    assert backend.seed() == 5


def test_floatx_is_a_float_type():
    assert backend.floatx() == "float32"
    for dtype in ("float16", "float64", "float32"):
        backend.set_floatx(dtype)
        assert backend.floatx() == dtype
    for wrong in ("float8", "int32", np.float64, None):
        with pytest.raises(ConfigError, match="floatx must be one of float16, float32, float64"):
            backend.set_floatx(wrong)


def test_to_host_keeps_numpys_arrays_and_makes_others():
    array = np.ones(3)
    assert backend.to_host(array) is array
    assert backend.to_host(Tensor(array)) is array
    assert type(backend.to_host(np.float32(2))) is np.ndarray
    np.testing.assert_array_equal(backend.to_host([1, 2]), [1, 2])


def test_the_module_of_numpys_arrays_is_numpy():
    assert backend.get_array_module() is np
    assert backend.get_array_module(np.ones(1), 3, Tensor(1.0)) is np
