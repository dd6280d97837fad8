"""Gradients that travel as whole numbers of one byte, with error feedback."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disttrain.comm import encodings
from disttrain.comm.encoded import Encoded
from disttrain.data_parallel.compression.compression import Carrier, Compression, Part


@dataclass(frozen=True)
class Int8(Compression):
    """A quarter of the bytes: 256 gradients share a scale, and what is rounded away is added to the next step's.

    Both roundings, of what a rank sends and of the sum, are remembered by the rank that rounds. Source: Tang et al.,
    "DoubleSqueeze: parallel stochastic gradient descent with double-pass error-compensated compression", 2019.
    """

    def carrier(self, parts: Sequence[Part], size: int, dtype: Any) -> Carrier:
        """Return a wire with memory."""
        memory = np.zeros(size, dtype)
        return Carrier(wire=Encoded(encodings.get("int8"), memory), memory=memory)
