"""Encodings: floats as fewer bytes, for a link that is slower than the cast."""

from abc import ABC, abstractmethod

import numpy as np

from disttrain.comm.pending import HostArray
from disttrain.errors import unknown_name
from disttrain.kernels import casts

_BLOCK = 256  # elements of a scale, as in kernels/cpu/casts.cpp
_LEAST_SCALE = np.finfo(np.float32).tiny


class Encoding(ABC):
    """A way to write floats as bytes. Bytes are uint8, shape ``(nbytes(n),)``; values are floats, shape ``(n,)``.

    What the methods of a subclass compute is the definition; where `values` are float32, a kernel of the encoding's
    name does it.
    """

    name: str

    @abstractmethod
    def nbytes(self, count: int) -> int:
        """Return the bytes of `count` values."""

    @abstractmethod
    def _encoded(self, values: HostArray) -> HostArray:
        """Return `values`, float32, as bytes."""

    @abstractmethod
    def _decoded(self, encoded: HostArray, count: int) -> HostArray:
        """Return `count` values, float32, that `encoded` holds."""

    def encode(self, values: HostArray, encoded: HostArray) -> None:
        """Write `values` to `encoded`."""
        if not casts.encode(self.name, values, encoded):
            with np.errstate(over="ignore", invalid="ignore"):
                encoded[...] = self._encoded(values.astype(np.float32, copy=False))

    def decode(self, encoded: HostArray, values: HostArray) -> None:
        """Write to `values` what `encoded` holds."""
        if not casts.decode(self.name, encoded, values):
            with np.errstate(over="ignore", invalid="ignore"):
                values[...] = self._decoded(encoded, values.size)

    def add(self, encoded: HostArray, values: HostArray) -> None:
        """Add to `values` what `encoded` holds."""
        with np.errstate(over="ignore", invalid="ignore"):
            if not casts.add(self.name, encoded, values):
                values += self._decoded(encoded, values.size).astype(values.dtype, copy=False)


class Float16(Encoding):
    """IEEE 754's binary16: 11 bits of precision; what is beyond 65504 becomes infinite, below 6e-8 it vanishes."""

    name = "float16"

    def nbytes(self, count: int) -> int:
        """Return the bytes of `count` values."""
        return 2 * count

    def _encoded(self, values: HostArray) -> HostArray:
        return values.astype(np.float16).view(np.uint8)

    def _decoded(self, encoded: HostArray, count: int) -> HostArray:
        return encoded.view(np.float16).astype(np.float32)


class BFloat16(Encoding):
    """The upper half of a float32, rounded to nearest, ties to even: its range, with 8 bits of precision."""

    name = "bfloat16"

    def nbytes(self, count: int) -> int:
        """Return the bytes of `count` values."""
        return 2 * count

    def _encoded(self, values: HostArray) -> HostArray:
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # of a NaN it may wrap around, and is not taken
        return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16).view(np.uint8)

    def _decoded(self, encoded: HostArray, count: int) -> HostArray:
        return (encoded.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class Int8(Encoding):
    """Whole numbers from -127 to 127, times a scale for each 256 of them: the largest of these is exact.

    A block with a NaN or an infinity becomes NaN, so that it shows; one whose largest is below 127 times the least
    normal float32 becomes 0.
    """

    name = "int8"

    def nbytes(self, count: int) -> int:
        """Return the bytes of `count` values, and of the scales in front of them."""
        return 4 * -(-count // _BLOCK) + count

    def _encoded(self, values: HostArray) -> HostArray:
        blocks = np.zeros((-(-values.size // _BLOCK), _BLOCK), np.float32)
        blocks.reshape(-1)[: values.size] = values
        scales = np.abs(blocks).max(axis=1) / np.float32(127)
        scales = np.where(
            np.isfinite(scales), np.where(scales < _LEAST_SCALE, np.float32(0), scales), np.float32("nan")
        )
        inverses = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
        rounded = np.rint(np.where(np.isnan(scales)[:, None], np.float32(0), blocks * inverses[:, None]))
        return np.concatenate(
            [scales.view(np.uint8), rounded.astype(np.int8).reshape(-1)[: values.size].view(np.uint8)]
        )

    def _decoded(self, encoded: HostArray, count: int) -> HostArray:
        scales = encoded[: self.nbytes(count) - count].view(np.float32)
        return encoded[scales.nbytes :].view(np.int8).astype(np.float32) * np.repeat(scales, _BLOCK)[:count]


_KNOWN = {encoding.name: encoding for encoding in (Float16(), BFloat16(), Int8())}


def get(name: str) -> Encoding:
    """Return the encoding of that name.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    if name not in _KNOWN:
        raise unknown_name("encoding", name, _KNOWN)
    return _KNOWN[name]
