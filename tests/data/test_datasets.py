"""Known data sets: what they contain, and that damaged files are named."""

import gzip
import hashlib
import struct
import subprocess
import sys

import numpy as np
import pytest

from disttrain.data import datasets
from disttrain.data.datasets import digits, fashion_mnist, house_prices
from disttrain.data.package import find
from disttrain.errors import ConfigError, DataError, DatasetMissingError


def load(name):
    """Return a data set that has to be fetched, or skip the test."""
    try:
        return getattr(datasets, name).load_data()
    except DatasetMissingError:
        pytest.skip(f"data set {name} is not on this machine: disttrain data {name}")


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_every_known_set_has_what_a_set_must_have():
    assert {"digits", "fashion_mnist", "house_prices"} <= set(datasets.names())
    for name in datasets.names():
        module = getattr(datasets, name)
        assert callable(module.load_data)
        assert module.LICENSE
        assert hasattr(module, "PACKAGE")
        assert name in dir(datasets)


def test_an_unknown_set_names_the_nearest_right_one():
    with pytest.raises(AttributeError, match="no data set 'fashion_mnits'; did you mean 'fashion_mnist'"):
        datasets.fashion_mnits  # noqa: B018 - the attribute is the test


def test_a_set_is_imported_when_it_is_asked_for():
    program = (
        "import sys; from disttrain.data import datasets; name = 'disttrain.data.datasets.digits'; "
        "print(name in sys.modules, end=' '); datasets.digits; print(name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_digits_are_those_of_the_source():
    (x_train, y_train), (x_test, y_test) = digits.load_data()
    assert (x_train.shape, x_test.shape) == ((1437, 8, 8), (360, 8, 8))
    assert {a.dtype.name for a in (x_train, y_train, x_test, y_test)} == {"uint8"}
    x, y = np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test])
    assert x.max() == 16
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # Hashes of scikit-learn 1.x's load_digits, as uint8.
    assert sha256(x) == "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
    assert sha256(y) == "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"


def test_fashion_mnist_is_whole():
    (x_train, y_train), (x_test, y_test) = load("fashion_mnist")
    assert (x_train.shape, y_train.shape) == ((60000, 28, 28), (60000,))
    assert (x_test.shape, y_test.shape) == ((10000, 28, 28), (10000,))
    assert {a.dtype.name for a in (x_train, y_train, x_test, y_test)} == {"uint8"}
    assert np.bincount(y_train).tolist() == [6000] * len(fashion_mnist.CLASSES)
    assert np.bincount(y_test).tolist() == [1000] * len(fashion_mnist.CLASSES)
    assert x_train.flags.writeable
    # A trouser is two legs: dark between them, unlike a dress.
    legs = x_train[y_train == fashion_mnist.CLASSES.index("Trouser")][:, 20:].mean(axis=(0, 1))
    assert legs[9:19].min() < 0.6 * legs.max()


def root_mean_square_error(x_train, y_train, x_test, y_test):
    """Return the error on the test part of least squares on standardised features and a constant."""
    mean, deviation = x_train.mean(0), x_train.std(0)
    fit, probe = (np.c_[np.ones(len(x)), (x - mean) / deviation] for x in (x_train, x_test))
    weights = np.linalg.lstsq(fit, y_train, rcond=1e-10)[0]
    return float(np.sqrt(np.mean((probe @ weights - y_test) ** 2)))


def with_curves(x):
    """Return features of houses, with logarithms of areas and powers of the year added."""
    column = dict(zip(house_prices.FEATURES, x.T, strict=True))
    areas = [np.log1p(column[f]) for f in ("TLA", "lotsize", "frontage", "depth", "garagesqft")]
    age = (1999 - column["yrbuilt"]) / 100
    return np.column_stack([x, *areas, age**2, age**3])


def test_house_prices_are_whole_and_can_be_learnt():
    (x_train, y_train), (x_test, y_test) = load("house_prices")
    assert (x_train.shape, x_test.shape) == ((20000, 35), (5357, 35))
    assert len(house_prices.FEATURES) == len(set(house_prices.FEATURES)) == 35
    x, y = np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test])
    assert np.isfinite(x).all()
    assert round(float(np.exp(y).mean())) == 79018
    column = dict(zip(house_prices.FEATURES, x.T, strict=True))
    assert (column["yrbuilt"].min(), column["yrbuilt"].max()) == (1835, 1998)
    for group, levels, without in (("s199", 6, 0), ("stories=", 5, 4), ("wall=", 7, 0), ("garage=", 5, 0)):
        one_hot = [values for name, values in column.items() if name.startswith(group)]
        assert len(one_hot) == levels
        assert np.bincount(np.sum(one_hot, axis=0).astype(int)).tolist()[-2:] == [without, len(y) - without]
    assert (x_train.std(axis=0) > 0).all()
    assert column["garage=carport"].sum() == 218
    # The mean as a guess has 0.77; here it is 0.418, and 0.382 with curves.
    assert root_mean_square_error(x_train, y_train, x_test, y_test) < 0.44
    assert root_mean_square_error(with_curves(x_train), y_train, with_curves(x_test), y_test) < 0.40


def test_house_prices_without_its_reader_names_the_command(monkeypatch):
    try:
        find("house_prices", house_prices.PACKAGE)
    except DatasetMissingError:
        pytest.skip("data set house_prices is not on this machine: disttrain data house_prices")
    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(ConfigError, match=r"pip install 'disttrain\[datasets\]'"):
        house_prices.load_data()


def idx(tmp_path, content):
    path = tmp_path / "data.gz"
    path.write_bytes(gzip.compress(content))
    return path


def header(*shape, magic=b"\0\0\x08"):
    return magic + struct.pack(f">B{len(shape)}I", len(shape), *shape)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (0, 3)])
def test_an_idx_file_gives_its_array(tmp_path, shape):
    expected = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    found = fashion_mnist.read_idx(idx(tmp_path, header(*shape) + expected.tobytes()))
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)
    assert found.shape == shape


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(2, 3) + bytes(5), r"\(2, 3\), which makes 6 bytes of data; it has 5"),
        (header(2, 3) + bytes(7), "makes 6 bytes of data; it has 7"),
        (header(2, 3)[:-4], "names 2 dimensions"),
        (header(2, 3)[:-6], "names 2 dimensions"),
        (header(2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(9), "it has 9"),
        (header(6, magic=b"\0\0\x0d") + bytes(6), "begins with '00 00 0d 01', expected '00 00 08'"),
        (header(6, magic=b"\x1f\0\x08") + bytes(6), "not an IDX file"),
        (header() + bytes(1), "from 1 to 4 dimensions"),
        (header(*[1] * 70) + bytes(1), "from 1 to 4 dimensions"),
        (b"\0\0", "not an IDX file"),
        (b"", "not an IDX file"),
    ],
)
def test_an_idx_file_that_is_not_what_it_says_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        fashion_mnist.read_idx(idx(tmp_path, content))


@pytest.mark.parametrize("keep", [0, 5, 25, -4])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = idx(tmp_path, header(100) + np.random.default_rng(0).bytes(100))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"data\.gz"):
        fashion_mnist.read_idx(path)
