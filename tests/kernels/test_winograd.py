"""Winograd's products are the definition within what their own roundings may add, and no byte beyond."""

import numpy as np
import pytest

from disttrain import ops
from disttrain.kernels import convolution
from tests.kernels.convolving import UNIT, arguments, numbers
from tests.kernels.shapes import NONE, ODD, ONE, WINOGRAD, Shape

EVERY_SHAPE = pytest.mark.parametrize("shape", WINOGRAD, ids=str)

# Absolute values of the transforms of cpu/winograd.cpp: of a kernel, of data, of results.
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]])
B = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]).T
A = np.array([[1, 1, 1, 0], [0, 1, 1, 1]]).T
PAYS = convolution.winograd_pays
LEAST_SUM = 64  # tiles, in the adjoint in the kernel


@pytest.fixture(autouse=True)
def _winograd(monkeypatch):
    """Use them wherever they apply."""
    monkeypatch.setattr(convolution, "winograd_pays", convolution.winograd_applies)


def squares(x, corner, tiles, side):
    """Return ``(n, p, q, side, side, c)``: the places of each tile, which begins at ``2 * (p, q) - corner``."""
    found = np.zeros((len(x), *tiles, side, side, x.shape[3]))
    for p, q, i, j in np.ndindex(*tiles, side, side):
        row, column = 2 * p - corner[0] + i, 2 * q - corner[1] + j
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            found[:, p, q, i, j] = x[:, row, column]
    return found


def within(transform, array, axes):
    """Return `transform` applied to both of `axes`."""
    for axis in axes:
        array = np.moveaxis(np.tensordot(transform, array, (1, axis)), 0, axis)
    return array


def sums(x, kernel, corner, out):
    """Return the sums of absolute values behind each result of a convolution."""
    tiles = tuple(-(-length // 2) for length in out)
    data = within(B.T, squares(x, corner, tiles, 4), (3, 4))
    products = np.einsum("npqabc,abcf->npqabf", data, within(G, kernel, (0, 1)))
    results = within(A.T, products, (3, 4)).transpose(0, 1, 3, 2, 4, 5)
    return results.reshape(len(x), 2 * tiles[0], 2 * tiles[1], kernel.shape[3])[:, : out[0], : out[1]]


def bounds(shape, arrays):
    """Return, for each op, the sums of absolute values and the number of roundings that each product goes through."""
    (x, kernel), (g, _), _ = ([np.abs(a).astype(float) for a in pair] for pair in arrays)
    top, left = shape.padding[0][0], shape.padding[1][0]
    tiles = tuple(-(-length // 2) for length in shape.out)
    data, cotangents = squares(x, (top, left), tiles, 4), squares(g, (0, 0), tiles, 2)
    total = np.einsum("npqabc,npqabf->abcf", within(B.T, data, (3, 4)), within(A, cotangents, (3, 4)))
    count = shape.images * tiles[0] * tiles[1]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    # A line of B' adds once, of G and of A' twice, of A once and of G' twice; each is applied to rows and to columns.
    return {
        "conv2d": (sums(x, kernel, (top, left), shape.out), 2 + 4 + shape.channels + 4),
        "conv2d_input": (sums(g, turned, (2 - top, 2 - left), shape.size), 2 + 4 + shape.filters + 4),
        "conv2d_kernel": (within(G.T, total, (0, 1)), 2 + 2 + count + -(-count // LEAST_SUM) + 4),
    }


@EVERY_SHAPE
def test_is_the_definition_in_float64_but_for_its_roundings(shape, instruction_set, guarded):
    calls = arguments(shape)
    limits = bounds(shape, [arrays for _, arrays, _, _ in calls])
    for name, arrays, attributes, _ in calls:
        got = getattr(convolution, name)(*map(guarded.copy, arrays), **attributes).run()
        exact = getattr(ops, name).definition(*[a.astype(float) for a in arrays], **attributes)
        size, roundings = limits[name]
        # Higham, "Accuracy and stability of numerical algorithms", lemma 3.1: each product of three of the inputs'
        # elements reaches the result with factors 1 + delta, as many as it goes through operations
        gamma = roundings * UNIT / (1 - roundings * UNIT)
        assert got.shape == exact.shape == size.shape
        assert (np.abs(got - exact) <= gamma * size).all(), name


@pytest.mark.parametrize("channels", [16, 64, 256])
def test_errors_are_about_those_of_direct_sums(channels, instruction_set, monkeypatch):
    """Of random numbers, in the mean: not more than twice as large. Within its roundings it could be 20 times."""
    shape = Shape(1, (8, 8), channels, (3, 3), 16, padding=ONE)
    for name, arrays, attributes, _ in arguments(shape):
        exact = getattr(ops, name).definition(*[a.astype(float) for a in arrays], **attributes)
        errors = []
        for pays in (convolution.winograd_applies, lambda geometry: False):
            monkeypatch.setattr(convolution, "winograd_pays", pays)
            errors.append(np.sqrt(np.mean((getattr(convolution, name)(*arrays, **attributes).run() - exact) ** 2)))
        assert errors[0] <= 2 * errors[1], name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("padding", [NONE, ONE, ODD], ids=["none", "one", "odd"])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (5, 4)], ids=str)
def test_nan_and_infinity_reach_what_they_reach_in_the_definition(value, padding, place, instruction_set):
    """Infinity as itself or as NaN; and they may spread within the tiles that see them, not further."""
    x, kernel = numbers(2, 6, 5, 5), numbers(3, 3, 5, 6)
    g = numbers(*ops.conv2d(x, kernel, padding=padding).shape)
    x[(1, *place, 1)] = g[(1, *np.minimum(place, np.array(g.shape[1:3]) - 1), 4)] = value
    top, left = padding[0][0], padding[1][0]
    for name, arrays, attributes, corner in [
        ("conv2d", (x, kernel), {}, (top, left)),
        ("conv2d_input", (g, kernel), {"size": (6, 5)}, (2 - top, 2 - left)),
        ("conv2d_kernel", (x, g), {"size": (3, 3)}, None),
    ]:
        got = getattr(convolution, name)(*arrays, padding=padding, **attributes).run()
        with np.errstate(invalid="ignore"):
            expected = getattr(ops, name).definition(*arrays, padding=padding, **attributes)
        assert np.isnan(got[np.isnan(expected)]).all()
        infinite = np.isinf(expected)
        assert (np.isnan(got[infinite]) | (got[infinite] == expected[infinite])).all()
        if corner is None:
            continue
        tiles = tuple(-(-length // 2) for length in got.shape[1:3])
        seen = ~np.isfinite(squares(arrays[0], corner, tiles, 4)).all((3, 4, 5))
        may = seen.repeat(2, 1).repeat(2, 2)[:, : got.shape[1], : got.shape[2]]
        assert np.isfinite(got[~may]).all()


def test_relu_leaves_nan(instruction_set):
    x, kernel = numbers(1, 6, 6, 5), numbers(3, 3, 5, 6)
    x[0, 1, 1, 0] = np.nan
    got = convolution.conv2d(x, kernel, padding=NONE, activation="relu").run()
    assert np.isnan(got[:, :2, :2]).all()
    assert np.isfinite(got[:, 2:, 2:]).all()


@pytest.mark.parametrize(
    ("shape", "pays"),
    [
        (Shape(1, (8, 8), 16, (3, 3), 16, padding=ONE), True),
        (Shape(64, (8, 8), 16, (3, 3), 16, padding=ONE), True),
        (Shape(64, (8, 8), 8, (3, 3), 64, padding=ONE), False),
        (Shape(64, (8, 8), 64, (3, 3), 8, padding=ONE), False),
        (Shape(64, (8, 8), 64, (3, 3), 64, (2, 2), ONE), False),
        (Shape(64, (8, 8), 64, (3, 3), 64, (1, 2), ONE), False),
        (Shape(64, (8, 8), 64, (5, 3), 64), False),
        (Shape(64, (3, 3), 64, (3, 3), 64), False),  # of a tile's four results one is wanted
        (Shape(64, (4, 3), 64, (3, 3), 64), False),  # or two
        (Shape(64, (5, 5), 64, (3, 3), 64), True),
    ],
    ids=str,
)
def test_they_serve_where_they_save_products_for_any_number_of_images(shape, pays, monkeypatch):
    monkeypatch.setattr(convolution, "winograd_pays", PAYS)
    asked = []
    monkeypatch.setattr(convolution, "native", lambda name: asked.append(name))
    for name, arrays, attributes, _ in arguments(shape):
        assert getattr(convolution, name)(*arrays, **attributes) is None
    kind = "winograd" if pays else "conv2d"
    assert asked == [kind, f"{kind}_input", f"{kind}_kernel"]
