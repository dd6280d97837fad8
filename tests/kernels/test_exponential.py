"""The exponential of kernels is as near to float64's as cpu/exponential.h says, over all float32 that there are."""

import ctypes

import numpy as np
import pytest

from disttrain.kernels import build as builder

SOURCE = """
#include "exponential.h"
extern "C" void exponentials(int64_t n, const float* x, float* y) {
    using namespace disttrain;
    for (int64_t i = 0; i < n; i += LANES) store(y + i, exponential(load(x + i)));
}
"""


@pytest.fixture
def exponential(instruction_set, tmp_path):
    (tmp_path / "exponentials.cpp").write_text(SOURCE)
    options = [*builder.OPTIONS, "-shared", *instruction_set.options, "-I", str(builder.SOURCES)]
    library = tmp_path / "exponentials.so"
    builder._run([*builder._compiler(), *options, str(tmp_path / "exponentials.cpp"), "-o", str(library)])
    compute = ctypes.CDLL(str(library)).exponentials

    def exponential(x):
        assert x.size % 16 == 0
        y = np.empty_like(x)
        compute(ctypes.c_int64(x.size), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data))
        return y

    return exponential


def test_exponential(exponential, instruction_set):
    # every 997th of all bit patterns: both signs, denormals, infinities, NaN; and densely where the result is no limit
    patterns = np.arange(0, 2**32, 997, dtype=np.uint64).astype(np.uint32).view(np.float32)
    dense = np.linspace(-105, 90, 1 << 20, dtype=np.float32)
    special = np.array([np.inf, -np.inf, np.nan, 0, -0.0, 88.72283, 88.72284, -87.33655, -103.97208, -103.97209])
    x = np.concatenate([patterns, dense, special.astype(np.float32)])
    x = np.concatenate([x, np.ones(-x.size % 16, np.float32)])
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        exact = np.exp(x.astype(float))
        rounded = exact.astype(np.float32)
        y = exponential(x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    finite = np.isfinite(rounded)
    assert (y[~finite & ~np.isnan(x)] == np.inf).all()
    unit = np.spacing(rounded[finite]).astype(float)
    most = 0.9 if "fma" in instruction_set.flags else 1.2
    assert (np.abs(y[finite] - exact[finite]) <= most * unit).all()
    assert (y >= 0)[~np.isnan(x)].all()
    assert (y[x == 0] == 1).all()
