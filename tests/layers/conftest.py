"""Every test of layers begins with seed 0 and float32, whatever the one before it did."""

import pytest

from disttrain import backend


@pytest.fixture(autouse=True)
def _defaults():
    backend.set_random_seed(0)
    backend.set_floatx("float32")
    yield
    backend.set_random_seed(0)
    backend.set_floatx("float32")
