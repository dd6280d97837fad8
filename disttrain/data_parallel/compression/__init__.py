"""Compression of gradients on their way between hosts: values that users choose, one file each."""

from collections.abc import Callable

from disttrain.data_parallel.compression.cast import BFloat16, Float16
from disttrain.data_parallel.compression.compression import Carrier, Compression, Part
from disttrain.data_parallel.compression.int8 import Int8
from disttrain.data_parallel.compression.power_sgd import PowerSGD
from disttrain.data_parallel.compression.top_k import TopK
from disttrain.errors import ConfigError, unknown_name

__all__ = ["BFloat16", "Carrier", "Compression", "Float16", "Int8", "Part", "PowerSGD", "TopK", "get"]

_KNOWN: dict[str, Callable[[], Compression]] = {
    "float16": Float16, "bfloat16": BFloat16, "int8": Int8, "powersgd": PowerSGD, "topk": TopK,
}  # fmt: skip


def get(compression: str | Compression | None) -> Compression | None:
    """Return the compression of that name with its defaults, or `compression` itself when it is one.

    Raises:
        ConfigError: there is none of that name.
    """
    if compression is None or isinstance(compression, Compression):
        return compression
    if not isinstance(compression, str):
        raise ConfigError(f"a compression is a name or a Compression, not {compression!r}")
    if compression.lower() not in _KNOWN:
        raise unknown_name("compression", compression, _KNOWN)
    return _KNOWN[compression.lower()]()
