"""Fashion-MNIST: 70,000 grey images of clothes, 28x28, in 10 classes.

Source: Xiao, Rasul & Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine
learning algorithms", 2017.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.data.package import Package, find
from disttrain.errors import DataError

LICENSE = "MIT; Copyright 2017 Zalando SE, https://github.com/zalandoresearch/fashion-mnist"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_FOLDER = "usr/share/datasets/fashion-mnist"
_TRAIN = (f"{_FOLDER}/train-images-idx3-ubyte.gz", f"{_FOLDER}/train-labels-idx1-ubyte.gz")
_TEST = (f"{_FOLDER}/t10k-images-idx3-ubyte.gz", f"{_FOLDER}/t10k-labels-idx1-ubyte.gz")
PACKAGE = Package(
    client="apt",
    name="dataset-fashion-mnist",
    files={
        _TRAIN[0]: "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        _TRAIN[1]: "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        _TEST[0]: "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        _TEST[1]: "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    },
)

_Pair = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def load_data() -> tuple[_Pair, _Pair]:
    """Return ``(x_train, y_train), (x_test, y_test)``: 60,000 and 10,000 samples.

    Images are uint8 from 0 to 255, shape ``(n, 28, 28)``; labels are uint8, places in `CLASSES`,
    shape ``(n,)``.

    Raises:
        DatasetMissingError: the set is not on this machine; the message names the command.
        DataError: a file is damaged.
    """
    root = find("fashion_mnist", PACKAGE)
    train, test = ((read_idx(root / x), read_idx(root / y)) for x, y in (_TRAIN, _TEST))
    return train, test


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """Return the array in a gzipped IDX file of bytes: uint8, of the shape that the file names.

    The file is two zero bytes, the type (8: unsigned bytes), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the data, row by row. What the header claims is
    compared with what is there before any array is made.

    Raises:
        DataError: the file is cut short, not IDX, or not of the size that its header names.

    Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits", 1998.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] not in range(1, 5):
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes: it begins with "
            f"{content[:4].hex(' ')!r}, expected '00 00 08' and from 1 to 4 dimensions"
        )
    start = 4 + 4 * content[3]
    header = np.frombuffer(content[4 : min(start, len(content)) // 4 * 4], dtype=">u4")
    shape = tuple(header.tolist())
    size = math.prod(shape)
    if len(content) < start or len(content) - start != size:
        raise DataError(
            f"{path} names {content[3]} dimensions {shape}, which makes {size} bytes of data; "
            f"it has {max(len(content) - start, 0)}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
