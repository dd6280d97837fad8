"""Kernels are compiled on first use, by the system's C++ compiler, into a cache that many ranks may share at once."""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import platformdirs
from filelock import FileLock

from disttrain.errors import DisttrainError
from disttrain.kernels.instruction_sets import RELEVANT_FLAGS, InstructionSet, cpu_flags
from disttrain.observe import log

SOURCES = Path(__file__).with_name("cpu")

# No -ffast-math: NaN must stay NaN, sums keep their order, and denormal numbers their value. These two change no value:
# errno and floating-point exceptions are not looked at. A product and a sum become one operation only where the source
# says so: elementwise kernels round as NumPy does.
OPTIONS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-Wno-psabi",
)  # fmt: skip

_TIMEOUT_S = 120


class BuildError(DisttrainError, RuntimeError):
    """Kernels cannot be built here; NumPy serves instead."""


def cache_dir() -> Path:
    """Return where built kernels are kept."""
    return platformdirs.user_cache_path("disttrain") / "kernels"


def build(instruction_set: InstructionSet, folder: Path | None = None) -> Path:
    """Return the library of all kernels for `instruction_set`, after compiling it where it is not in `folder` yet.

    Any number of processes may do so at once: one compiles, the others wait.

    Args:
        instruction_set: to compile for.
        folder: the cache; by default the user's.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written; says which.
    """
    folder = folder or cache_dir()
    compiler = _compiler()
    command = [*compiler, *OPTIONS, *instruction_set.options]
    library = folder / f"{instruction_set.name}-{_key(command, _version(compiler))}.so"
    try:
        if library.exists():
            return library
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock"), timeout=_TIMEOUT_S):
            if not library.exists():
                start = time.perf_counter()
                _compile(command, library)
                log.info(
                    "built kernels for %s with %s in %.1f s: %s",
                    instruction_set.name, shlex.join(compiler), time.perf_counter() - start, library,
                )  # fmt: skip
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be used: {error}") from error
    return library


def _compiler() -> list[str]:
    """Return the command of the C++ compiler: ``CXX``, else the system's."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"CXX={shlex.join(named)} is not on this machine" if named else "there is no C++ compiler")


def _version(compiler: list[str]) -> str:
    return _run([*compiler, "--version"])


def _key(command: list[str], version: str) -> str:
    """Return what tells apart libraries that differ: by sources, command, compiler and CPU."""
    made = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        made.update(f"{path.name}\n{path.read_text()}\n".encode())
    made.update("\n".join([*command, version, *sorted(cpu_flags() & RELEVANT_FLAGS)]).encode())
    return made.hexdigest()[:16]


def _compile(command: list[str], library: Path) -> None:
    """Compile all sources to `library`, which appears whole or not at all."""
    # beside the library, since a rename is one step within a file system only
    with tempfile.TemporaryDirectory(prefix=f".{library.stem}.", dir=library.parent) as scratch:
        made = Path(scratch, library.name)
        _run([*command, *sorted(map(str, SOURCES.glob("*.cpp"))), "-o", str(made)])
        if not made.exists():
            raise BuildError(f"{shlex.join(command)} ended well and wrote nothing")
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(library)


def _run(command: list[str]) -> str:
    """Return what `command` writes; its last lines are quoted when it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {_TIMEOUT_S} s") from error
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error}") from error
    if done.returncode != 0:
        last = "".join(f"\n    {line}" for line in done.stdout.splitlines()[-5:])
        raise BuildError(f"{shlex.join(command[:1])} ended with exit code {done.returncode}{last}")
    return done.stdout
