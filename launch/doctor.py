"""`disttrain doctor`: what this machine gives disttrain to work with, and what computes."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import threadpoolctl

import disttrain
from disttrain import env
from disttrain.errors import DisttrainError
from disttrain.kernels.build import cache_dir
from disttrain.kernels.instruction_sets import RELEVANT_FLAGS, cpu_flags, runnable
from disttrain.kernels.library import chosen
from launch.mpirun import find_mpi

# The backspace keeps click from joining the lines.
_EXAMPLES = """\b
Examples:
  disttrain doctor
  DISTTRAIN_KERNELS=avx2 disttrain doctor
  disttrain doctor --json doctor.json
"""

# In a process of its own, and not initialized: it may be another MPI than the launcher's.
_ASK_MPI4PY = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().partition(chr(0))[0].splitlines()[0])
"""
_TIMEOUT_S = 60

# Flags beyond those that kernels need today.
_OTHER_FLAGS = frozenset({"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "f16c"})


@click.command(epilog=_EXAMPLES)
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, writable=True), help="Write the findings there as well."
)
def doctor(file: str | None) -> None:
    """Say what is on this machine, which kernels compute and why, and which MPI starts workers."""
    found = {name: _found(look) for name, look in _LOOKS.items()}
    width = max(map(len, found))
    for name, facts in found.items():
        text = ", ".join(f"{key} {_readable(value)}" for key, value in facts.items())
        click.echo(f"{name:{width}}  {text}")
    if file:
        Path(file).write_text(json.dumps(found, indent=2) + "\n")


def _versions() -> dict[str, Any]:
    return {"disttrain": disttrain.__version__, "Python": platform.python_version(), "NumPy": np.__version__}


def _blas() -> dict[str, Any]:
    libraries = [each for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas"]
    if not libraries:
        return {"library": "unknown to threadpoolctl"}
    first = libraries[0]
    return {
        "library": first["internal_api"],
        "version": first["version"],
        "architecture": first.get("architecture"),
        "threads": first["num_threads"],
    }


def _cpu() -> dict[str, Any]:
    flags = cpu_flags()
    return {
        "architecture": platform.machine(),
        "flags": sorted(flags & (RELEVANT_FLAGS | _OTHER_FLAGS)),
        "cores": len(os.sched_getaffinity(0)),
        "of": os.cpu_count(),
    }


def _kernels() -> dict[str, Any]:
    choice = chosen()
    facts: dict[str, Any] = {"used": choice.name, "possible": [each.name for each in runnable(cpu_flags())]}
    facts["threads"] = env.threads() or 1
    if choice.path:
        facts["library"] = str(choice.path)
    if choice.reason:
        facts["because"] = choice.reason
    if env.kernels():
        facts[env.KERNELS] = env.kernels()
    return facts


def _caches() -> dict[str, Any]:
    return {"kernels": str(cache_dir()), "data": str(env.data_dir())}


def _launcher() -> dict[str, Any]:
    mpi = find_mpi()
    return {"mpiexec": mpi.mpiexec, "flavour": mpi.flavour}


def _mpi4py() -> dict[str, Any]:
    if importlib.util.find_spec("mpi4py") is None:
        return {"problem": "not installed"}
    done = subprocess.run(
        [sys.executable, "-c", _ASK_MPI4PY],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_TIMEOUT_S,
        check=False,
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return {"loads" if done.returncode == 0 else "problem": lines[-1] if lines else f"exit code {done.returncode}"}


_LOOKS: dict[str, Callable[[], dict[str, Any]]] = {
    "versions": _versions,
    "CPU": _cpu,
    "kernels": _kernels,
    "BLAS": _blas,
    "MPI": _launcher,
    "mpi4py": _mpi4py,
    "caches": _caches,
}


def _found(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `look` finds; a problem is a finding as well."""
    try:
        return look()
    except (DisttrainError, OSError, subprocess.SubprocessError) as error:
        return {"problem": str(error)}


def _readable(value: object) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
