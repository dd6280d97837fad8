"""What convolutions hold to by whichever products they are formed: directly, or by Winograd's."""

import numpy as np
import pytest

from disttrain.kernels import convolution
from tests.kernels.convolving import arguments, numbers
from tests.kernels.shapes import CONVOLUTIONS, WINOGRAD

CASES = [("direct", shape) for shape in CONVOLUTIONS] + [("winograd", shape) for shape in WINOGRAD]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def shape(request, monkeypatch):
    products, shape = request.param
    pays = convolution.winograd_applies if products == "winograd" else lambda geometry: False
    monkeypatch.setattr(convolution, "winograd_pays", pays)
    return shape


def test_the_bits_do_not_depend_on_alignment_or_on_the_call_before(shape, instruction_set, guarded):
    for name, arrays, attributes, _ in arguments(shape):
        compute = getattr(convolution, name)
        first = compute(*arrays, **attributes).run()
        for shift in (0, 4, 36):
            again = compute(*[guarded.copy(a, shift) for a in arrays], **attributes).run()
            assert again.tobytes() == first.tobytes(), name


def test_an_image_has_the_same_bits_in_any_batch(shape, instruction_set):
    for name, arrays, attributes, _ in arguments(shape)[:2]:
        compute = getattr(convolution, name)
        whole = compute(*arrays, **attributes).run()
        for n in {0, shape.images // 2, shape.images - 1} if shape.images else ():
            alone = compute(arrays[0][n : n + 1], arrays[1], **attributes).run()
            assert alone.tobytes() == whole[n : n + 1].tobytes(), name


def test_bias_and_relu_are_what_they_are_afterwards(shape, instruction_set, guarded):
    _, (x, kernel), window, _ = arguments(shape)[0]
    bias = numbers(shape.filters)
    plain = convolution.conv2d(x, kernel, **window).run()
    given = [guarded.copy(a) for a in (x, kernel, bias)]
    np.testing.assert_array_equal(convolution.conv2d(*given, **window).run(), plain + bias)
    for added in (given[2], None):
        got = convolution.conv2d(*given[:2], added, activation="relu", **window).run()
        np.testing.assert_array_equal(got, np.maximum(plain if added is None else plain + bias, 0))
