"""The library of kernels that this process uses: chosen and loaded at the first op that could use one."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from disttrain import env
from disttrain.backend import Array
from disttrain.kernels.build import BuildError, build
from disttrain.kernels.instruction_sets import NUMPY, choose, cpu_flags
from disttrain.observe import log

_POINTER, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

CASTS = ("bfloat16", "float16", "int8")

# The arguments of each function of cpu/*.cpp.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "conv2d": (*(_POINTER,) * 4, _NUMBER, _POINTER),
    "conv2d_input": (_POINTER,) * 4,
    "conv2d_kernel": (_POINTER,) * 4,
    "matmul": (_POINTER,) * 5,
    "max_pool2d": (_POINTER,) * 3,
    "put_at_maximum": (_POINTER,) * 4,
    "average_pool2d": (_POINTER,) * 3,
    "spread": (_POINTER,) * 3,
    "sgd": (_NUMBER, *(_POINTER,) * 2, _FLOAT),
    "momentum": (_NUMBER, *(_POINTER,) * 3, *(_FLOAT,) * 2),
    "nesterov": (_NUMBER, *(_POINTER,) * 3, *(_FLOAT,) * 2),
    "adam": (_NUMBER, *(_POINTER,) * 4, *(_FLOAT,) * 5),
    **{f"{verb}_{name}": (_NUMBER, *(_POINTER,) * 2) for verb in ("encode", "decode", "add") for name in CASTS},
    "low_rank": (*(_NUMBER,) * 3, *(_POINTER,) * 3),
    "low_rank_rest": (*(_NUMBER,) * 3, *(_POINTER,) * 4),
    "set_threads": (_NUMBER,),
    "attention": (_POINTER,) * 6,
    "attention_gradients": (_POINTER,) * 9,
    "lstm": (_POINTER,) * 6,
    "lstm_gradients": (_POINTER,) * 11,
    "gru": (_POINTER,) * 6,
    "gru_gradients": (_POINTER,) * 11,
    "where_positive": (_NUMBER, *(_POINTER,) * 3),
    "silu": (_NUMBER, *(_POINTER,) * 2),
    "silu_gradient": (_NUMBER, *(_POINTER,) * 3),
    "softplus": (_NUMBER, *(_POINTER,) * 2),
    "softplus_gradient": (_NUMBER, *(_POINTER,) * 3),
    "winograd": (*(_POINTER,) * 4, _NUMBER, _POINTER),
    "winograd_input": (_POINTER,) * 4,
    "winograd_kernel": (_POINTER,) * 4,
    "batch_norm": (*(_NUMBER,) * 2, *(_POINTER,) * 5, _FLOAT, _POINTER),
    "batch_norm_input": (*(_NUMBER,) * 2, *(_POINTER,) * 6, _FLOAT, _POINTER),
    "channel_sums": (*(_NUMBER,) * 2, *(_POINTER,) * 2),
    "cotangent_sums": (*(_NUMBER,) * 2, *(_POINTER,) * 4),
    "square_sums": (*(_NUMBER,) * 2, *(_POINTER,) * 3),
    "gelu": (*(_NUMBER,) * 2, *(_POINTER,) * 2),
    "gelu_gradient": (*(_NUMBER,) * 2, *(_POINTER,) * 3),
    "layer_norm": (*(_NUMBER,) * 2, *(_POINTER,) * 3, _FLOAT, _POINTER),
    "layer_norm_input": (*(_NUMBER,) * 2, *(_POINTER,) * 3, _FLOAT, _POINTER),
    "layer_norm_scale": (*(_NUMBER,) * 2, *(_POINTER,) * 2, _FLOAT, _POINTER),
    "take_rows": (*(_NUMBER,) * 3, *(_POINTER,) * 3),
    "add_rows": (*(_NUMBER,) * 3, *(_POINTER,) * 3),
    "sum_rows": (*(_NUMBER,) * 2, *(_POINTER,) * 2),
    "softmax": (*(_NUMBER,) * 2, *(_POINTER,) * 2),
    "softmax_gradient": (*(_NUMBER,) * 2, *(_POINTER,) * 3),
    "log_softmax": (*(_NUMBER,) * 2, *(_POINTER,) * 2),
    "log_softmax_gradient": (*(_NUMBER,) * 2, *(_POINTER,) * 3),
    "softmax_cross_entropy": (*(_NUMBER,) * 2, *(_POINTER,) * 3),
    "softmax_cross_entropy_gradient": (*(_NUMBER,) * 2, *(_POINTER,) * 5),
    "sparse_softmax_cross_entropy": (*(_NUMBER,) * 2, *(_POINTER,) * 3),
    "sparse_softmax_cross_entropy_gradient": (*(_NUMBER,) * 2, *(_POINTER,) * 5),
    "slots_bytes": (),
    "start_all_reduce": (_POINTER, _POINTER, _NUMBER),
    "continue_all_reduce": (_POINTER, _NUMBER),
    "announced": (_POINTER, _NUMBER, _POINTER),
    "fence": (),
}
_MAY_LACK_MEMORY = frozenset(
    {"matmul", *(name for name in _SIGNATURES if name.startswith(("attention", "conv2d", "gru", "lstm", "winograd")))}
)
_RETURN_A_NUMBER = frozenset({"take_rows", "add_rows", "slots_bytes", "start_all_reduce", "continue_all_reduce"})
_MAY_MISS_A_LABEL = frozenset({"sparse_softmax_cross_entropy", "sparse_softmax_cross_entropy_gradient"})


class Launch(NamedTuple):
    """A call of a kernel, prepared: ``function(*args)`` computes `output`, as often as it is called.

    Its arguments point to arrays: whoever keeps it keeps those.
    """

    function: Any
    args: tuple[Any, ...]
    output: Array

    def run(self) -> Array:
        """Compute the output, and return it."""
        self.function(*self.args)
        return self.output


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What computes in this process.

    Attributes:
        name: the instruction set of the kernels, or ``"numpy"``.
        path: the library; None for NumPy.
        reason: why NumPy serves, where it was not asked for; else empty.
        functions: the kernels by name; empty for NumPy. They release the interpreter's lock while they compute.
    """

    name: str
    path: Path | None = None
    reason: str = ""
    functions: dict[str, Any]


@functools.cache
def chosen() -> Choice:
    """Return what computes here; builds and loads it at the first call.

    Raises:
        ConfigError: ``DISTTRAIN_KERNELS`` names what there is not, or what this CPU cannot run; ``DISTTRAIN_THREADS``
            is no number of threads.
    """
    instruction_set = choose(env.kernels(), cpu_flags())
    if instruction_set is None:
        return Choice(name=NUMPY, functions={})
    try:
        path = build(instruction_set)
        functions = load(path)
        functions["set_threads"](env.threads() or 1)
        return Choice(name=instruction_set.name, path=path, functions=functions)
    except BuildError as error:
        # once on a node, not once a rank
        say = log.warning if env.place().local_rank == 0 else log.debug
        say("no native kernels for %s: NumPy computes, slower: %s", instruction_set.name, error)
        return Choice(name=NUMPY, reason=str(error), functions={})


def load(path: Path) -> dict[str, Any]:
    """Return the functions of the library at `path` by name, with the types of their arguments set.

    Raises:
        BuildError: it cannot be loaded.
    """
    try:
        library = ctypes.CDLL(str(path))
        functions = {name: library[f"disttrain_{name}"] for name in _SIGNATURES}
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}; remove it, and it is built again") from error
    for name, function in functions.items():
        function.argtypes = _SIGNATURES[name]
        function.restype = ctypes.c_int if name in _RETURN_A_NUMBER else None
        for names, check in ((_MAY_LACK_MEMORY, _check_memory), (_MAY_MISS_A_LABEL, _check_labels)):
            if name in names:
                function.restype, function.errcheck = ctypes.c_int, check
    return functions


def _check_memory(failed: Any, function: Any, _args: Any) -> Any:
    if failed:
        raise MemoryError(f"{function.__name__}: there is no memory for what it computes with")
    return failed


def _check_labels(failed: Any, function: Any, args: Any) -> Any:
    if failed:
        raise IndexError(f"{function.__name__}: a label is none of the {args[1]} classes")
    return failed


def native(name: str) -> Any:
    """Return the kernel `name`, or None where NumPy computes."""
    return chosen().functions.get(name)


def applies_to(*arrays: Array) -> bool:
    """Return whether kernels can read `arrays`: of NumPy, float32, in C order without gaps."""
    return all(
        type(a) is np.ndarray and a.dtype == np.float32 and a.flags.c_contiguous and a.flags.aligned for a in arrays
    )


def new_array(shape: tuple[int, ...], out: Array | None) -> Array:
    """Return an array for a kernel to fill: `out` where a plan gives one, which has that shape."""
    return np.empty(shape, np.float32) if out is None else out


def address(array: Array) -> int:
    """Return where the elements of `array` lie: for a call during which something refers to it."""
    return int(array.__array_interface__["data"][0])  # five times faster than array.ctypes.data
