"""Which instruction sets there are kernels for, and which of them this CPU runs: by its flags, never by its model."""

import functools
from dataclasses import dataclass
from pathlib import Path

from disttrain.env import KERNELS
from disttrain.errors import ConfigError

NUMPY = "numpy"  # no kernels


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """What the same sources are compiled for.

    Attributes:
        name: as in ``DISTTRAIN_KERNELS``.
        flags: what the CPU must have, as Linux calls it.
        options: the compiler's.
    """

    name: str
    flags: frozenset[str]
    options: tuple[str, ...]


# Without an option a compiler may choose 256-bit vectors for a CPU that has wider ones.
_AVX512 = InstructionSet(
    name="avx512",
    flags=frozenset({"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx2", "fma"}),
    options=("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
)

# The widest first.
_ALL = (
    InstructionSet(
        name="amx",  # matrix units beside vectors; nobody has run it on a CPU that has them yet
        flags=_AVX512.flags | {"amx_tile", "amx_bf16"},
        options=(*_AVX512.options, "-mamx-tile", "-mamx-bf16"),
    ),
    _AVX512,
    InstructionSet(name="avx2", flags=frozenset({"avx2", "fma"}), options=("-mavx2", "-mfma")),
    InstructionSet(name="portable", flags=frozenset(), options=()),
)  # fmt: skip

RELEVANT_FLAGS = frozenset().union(*(each.flags for each in _ALL))


@functools.cache
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the flags of this CPU that the operating system lets programs use; none where it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":")[1].split()) for line in lines if line.startswith("flags")), frozenset())


def runnable(flags: frozenset[str]) -> list[InstructionSet]:
    """Return the instruction sets that a CPU with `flags` runs, the widest first."""
    return [each for each in _ALL if each.flags <= flags]


def choose(wanted: str, flags: frozenset[str]) -> InstructionSet | None:
    """Return the instruction set to use on a CPU with `flags`: `wanted`, else the widest; None for NumPy.

    Raises:
        ConfigError: there is none called `wanted`, or this CPU does not run it; names those that it does.
    """
    usable = runnable(flags)
    if not wanted:
        return usable[0]
    if wanted == NUMPY:
        return None
    for each in usable:
        if each.name == wanted:
            return each
    lacking = next((sorted(each.flags - flags) for each in _ALL if each.name == wanted), None)
    why = f"this CPU lacks {', '.join(lacking)}" if lacking else "there is no such instruction set"
    names = ", ".join([NUMPY, *(each.name for each in reversed(usable))])
    raise ConfigError(f"{KERNELS}={wanted}: {why}; possible here: {names}")
