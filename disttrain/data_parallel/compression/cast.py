"""Gradients that travel as floats of two bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disttrain.comm import encodings
from disttrain.comm.encoded import Encoded
from disttrain.data_parallel.compression.compression import Carrier, Compression, Part


@dataclass(frozen=True)
class Float16(Compression):
    """Half the bytes, 11 bits of precision; gradients beyond 65504 become infinite, below 6e-8 they vanish."""

    def carrier(self, parts: Sequence[Part], size: int, dtype: Any) -> Carrier:
        """Return a wire without memory."""
        return Carrier(wire=Encoded(encodings.get("float16")))


@dataclass(frozen=True)
class BFloat16(Compression):
    """Half the bytes, the range of float32, 8 bits of precision."""

    def carrier(self, parts: Sequence[Part], size: int, dtype: Any) -> Carrier:
        """Return a wire without memory."""
        return Carrier(wire=Encoded(encodings.get("bfloat16")))
