"""Arrays between guard bytes, as badly aligned as float32 may be."""

import numpy as np

_GUARD = 256  # bytes before and after
_PATTERN = 0xA5


class Guarded:
    """Makes arrays and remembers their guards."""

    def __init__(self):
        self._made = []

    def new_array(self, shape, out=None, shift=4, dtype=np.float32):
        """Return an array of garbage that begins `shift` bytes after a multiple of 64."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.full(nbytes + 2 * _GUARD + 64, _PATTERN, np.uint8)
        start = _GUARD + (shift - raw.ctypes.data - _GUARD) % 64
        inside = raw[start : start + nbytes]
        self._made.append((raw, start, start + nbytes))
        return inside.view(dtype).reshape(shape)

    def copy(self, array, shift=4):
        made = self.new_array(array.shape, shift=shift)
        made[...] = array
        return made

    def check(self):
        for raw, start, end in self._made:
            assert (raw[:start] == _PATTERN).all(), "a kernel wrote before an array"
            assert (raw[end:] == _PATTERN).all(), "a kernel wrote behind an array"
