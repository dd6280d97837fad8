"""What a test sets for the whole process is put back after it."""

import pytest

from disttrain import backend


@pytest.fixture(autouse=True)
def _settings():
    floatx, seed = backend.floatx(), backend.seed()
    yield
    backend.set_floatx(floatx)
    backend.set_random_seed(seed)


@pytest.fixture
def float64():
    """Make float64 the dtype of the test: sums in another order then differ by 1e-16, not by 1e-7."""
    backend.set_floatx("float64")
