"""NumPy or CuPy behind one name, the default float type, and random numbers that do not depend on who draws them."""

import hashlib
import sys
from typing import Any, TypeAlias

import numpy as np

from disttrain.errors import ConfigError

# An array of NumPy or CuPy and, in the rule of an op, a Tensor: whatever has their common interface.
Array: TypeAlias = Any

_FLOATS = ("float16", "float32", "float64")
_floatx = "float32"
_seed = 0


def get_array_module(*arrays: Array) -> Any:
    """Return the module of `arrays`: cupy if any is on a GPU, else numpy."""
    if "cupy" in sys.modules and any(type(a).__module__.startswith("cupy") for a in arrays):
        return sys.modules["cupy"]
    return np


def to_host(array: Array) -> np.ndarray[Any, Any]:
    """Return `array` as a NumPy array: itself when it is one, else a copy from the device."""
    if isinstance(array, np.ndarray):
        return array
    if get_array_module(array) is np:
        return np.asarray(array)
    return np.asarray(array.get())


def floatx() -> str:
    """Return the dtype of new weights and of float inputs: ``"float32"`` unless it was set."""
    return _floatx


def set_floatx(dtype: str) -> None:
    """Make `dtype` the dtype of weights created from now on: float16, float32 or float64."""
    global _floatx
    if dtype not in _FLOATS:
        raise ConfigError(f"floatx must be one of {', '.join(_FLOATS)}, not {dtype!r}")
    _floatx = dtype


def seed() -> int:
    """Return the seed that all random numbers of the library derive from: 0 unless it was set."""
    return _seed


def set_random_seed(seed: int) -> None:
    """Set the seed of initial weights, shuffling and dropout; the same on all ranks.

    Raises:
        ConfigError: `seed` is not an integer of 64 bits, counted from 0.
    """
    global _seed
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed must be an integer from 0 to 2**64 - 1, not {seed!r}")
    _seed = int(seed)


def philox(*key: int | str, first_block: int = 0) -> np.random.Philox:
    """Return a counter-based bit generator: the same `key` gives the same bits, anywhere, in any order.

    Args:
        key: what the numbers are for, such as ``(seed, "dropout", step)``.
        first_block: how many blocks of four 64-bit words to leave out; costs nothing.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    text = "\x1f".join(f"{'str' if isinstance(part, str) else 'int'}:{part}" for part in key)
    words = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype="<u8")
    return np.random.Philox(key=words.astype(np.uint64), counter=first_block)


def random_generator(*key: int | str) -> np.random.Generator:
    """Return a NumPy generator over `philox(*key)`."""
    return np.random.Generator(philox(*key))


def sample_bits(*key: int | str, first: int, samples: int, per_sample: int) -> np.ndarray[Any, Any]:
    """Return random 32-bit words for samples `first` to ``first + samples - 1`` of a global batch.

    A sample's words depend on `key` and its own number only, not on which others are drawn with it.

    Returns:
        uint32, shape ``(samples, per_sample)``.
    """
    blocks = -(-per_sample // 8)  # a block has four 64-bit words
    raw = philox(*key, first_block=first * blocks).random_raw(samples * blocks * 4)
    return raw.view(np.uint32).reshape(samples, blocks * 8)[:, :per_sample]
