"""Every op gives on CuPy's arrays what it gives on NumPy's, forward and backward: the same code serves a GPU.

Runs where CuPy finds a device, or an emulation of one: `make cupy EMUGPU=folder`.
"""

import numpy as np
import pytest

from disttrain import Tensor
from disttrain.backend import to_host
from tests.autodiff.cases import CASES

cupy = pytest.importorskip("cupy", reason="CuPy is not installed: ops on a GPU's arrays are not proven here")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpus_arrays_give_numpys_values_and_gradients(case):
    host = [Tensor(a, requires_grad=True) for a in case.args]
    device = [Tensor(cupy.asarray(a), requires_grad=True) for a in case.args]
    expected, got = case.call(*host), case.call(*device)
    assert isinstance(got.data, cupy.ndarray)
    # float64: sums of fewer than 1000 terms below 50, in another order, and functions within a few units of rounding
    bound = {"rtol": 1000 * 2**-53, "atol": 50 * 1000 * 2**-53}
    np.testing.assert_allclose(to_host(got.data), expected.data, **bound)
    seed = np.linspace(-1, 1, expected.size).reshape(expected.shape)
    expected.backward(seed)
    got.backward(cupy.asarray(seed))
    for on_host, on_device in zip(host, device, strict=True):
        assert isinstance(on_device.grad, cupy.ndarray)
        np.testing.assert_allclose(to_host(on_device.grad), on_host.grad, **bound)
