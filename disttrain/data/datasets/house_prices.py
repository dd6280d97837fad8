"""House prices: 25,357 single family homes sold in Lucas County, Ohio, from 1993 to 1998.

Source: the county's auditor; `house` of R's package spData, https://cran.r-project.org/package=spData.
"""

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from disttrain.data.package import Package, find
from disttrain.data.shard import permute
from disttrain.errors import ConfigError

LICENSE = "CC0-1.0; R package spData of Roger Bivand, Jakub Nowosad and Robin Lovelace"

_DATABASE = "usr/lib/R/site-library/spData/data/Rdata"
PACKAGE = Package(
    client="apt",
    name="r-cran-spdata",
    version="2.2.1-1",
    files={
        f"{_DATABASE}.rdb": "b277a0d8e6ff85c4bb3d9eb52d3b32379fab65efa1ebaa3a005555406aa30637",
        f"{_DATABASE}.rdx": "d65c5f1ffd1fe318fb1f7c4dbc57b522f632d805a3e2ff0846e0680da26c0184",
    },
)

# TLA is the total living area; s1993 ... are 1 in the year of the sale. The source names no units: by
# their size these are feet and square feet. Left out: `avalue`, the auditor's own estimate of the
# price; `sdate` and `syear`, since s1993 ... tell the year; `age`, since `yrbuilt` tells it.
_NUMBERS = (
    *("yrbuilt", "TLA", "beds", "baths", "halfbaths", "frontage", "depth", "garagesqft", "rooms"),
    *("lotsize", "s1993", "s1994", "s1995", "s1996", "s1997", "s1998"),
)
# Two homes have two+half stories and two have three: features that training might never see vary.
_FACTORS = {
    "stories": ("one", "bilevel", "multilvl", "one+half", "two"),
    "wall": ("stucdrvt", "ccbtile", "metlvnyl", "brick", "stone", "wood", "partbrk"),
    "garage": ("no garage", "basement", "attached", "detached", "carport"),
}
_PLACE = ("long", "lat")  # not degrees: metres east and north, in a Lambert projection of Ohio
FEATURES = (
    *_NUMBERS,
    *_PLACE,
    *(f"{factor}={level}" for factor, levels in _FACTORS.items() for level in levels),
)

_TRAIN_SIZE = 20_000

_Pair = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def load_data() -> tuple[_Pair, _Pair]:
    """Return ``(x_train, y_train), (x_test, y_test)``: 20,000 and 5,357 homes, drawn once at random.

    Features are float64, shape ``(n, 35)``, as in the source, not scaled: `FEATURES` names them, and
    each level of a factor is a feature of 0 or 1. The target is the natural logarithm of the price in
    dollars, float64, shape ``(n,)``.

    Raises:
        DatasetMissingError: the set is not on this machine; the message names the command.
        DataError: a file is damaged.
        ConfigError: the package `rdata`, which reads R's files, is not installed.
    """
    root = find("house_prices", PACKAGE)
    parts = _read_house(root / f"{_DATABASE}.rdx", root / f"{_DATABASE}.rdb")
    table, places = parts["data"], np.asarray(parts["coords"])
    factors = [
        np.asarray(table[factor].to_numpy(str) == level) for factor, levels in _FACTORS.items() for level in levels
    ]
    numbers = [table[number].to_numpy(np.float64) for number in _NUMBERS]
    x = np.column_stack([*numbers, places, *factors]).astype(np.float64)
    y = np.log(table["price"].to_numpy(np.float64))
    order = permute(np.arange(len(y)), len(y), seed=0, epoch=0)
    train, test = order[:_TRAIN_SIZE], order[_TRAIN_SIZE:]
    return (x[train], y[train]), (x[test], y[test])


def _read_house(index: Path, database: Path) -> dict[str, Any]:
    """Return the slots ``data``, a table, and ``coords``, an array, of the object `house`.

    A lazy-load database of R is a file of objects, each in R's serial format, compressed by zlib,
    after its length as a big-endian 32-bit integer. The index, itself an object, names their places.
    """
    try:
        import rdata
    except ImportError as error:
        raise ConfigError(
            "house_prices is read by the package rdata, which is not installed; run: pip install 'disttrain[datasets]'"
        ) from error
    parse, convert = rdata.parser.parse_data, rdata.conversion.convert
    names = convert(parse(gzip.decompress(index.read_bytes()), extension=".rds"))
    start, length = names["variables"]["house"]
    record = database.read_bytes()[start : start + length]
    house = parse(zlib.decompress(record[4:]), extension=".rds")
    # Slots are a linked list. Only two are converted: rdata warns of classes that it does not know.
    slots: dict[str, Any] = {}
    rest: Any = house.object.attributes
    while isinstance(rest.value, tuple):
        slot, following = rest.value
        name = (rest.tag.referenced_object or rest.tag).value.value.decode()
        if name in ("data", "coords"):
            slots[name] = convert(slot)
        rest = following
    return slots
