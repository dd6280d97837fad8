"""Kernels are compiled by the system's C++ compiler: at installation, else on first use, into a cache.

Many ranks may share the cache at once.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
from filelock import FileLock

from disttrain import env
from disttrain.errors import DisttrainError
from disttrain.kernels.instruction_sets import RELEVANT_FLAGS, InstructionSet, choose, cpu_flags
from disttrain.observe import log

SOURCES = Path(__file__).with_name("cpu")
INSTALLED = Path(__file__).with_name("installed")

# No -ffast-math: NaN must stay NaN, sums keep their order, and denormal numbers their value. These two change no value:
# errno and floating-point exceptions are not looked at. A product and a sum become one operation only where the source
# says so: elementwise kernels round as NumPy does.
OPTIONS = (
    "-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-Wno-psabi",
)  # fmt: skip

_TIMEOUT_S = 120


class BuildError(DisttrainError, RuntimeError):
    """Kernels cannot be built here; NumPy serves instead."""


def cache_dir() -> Path:
    """Return where built kernels are kept."""
    return platformdirs.user_cache_path("disttrain") / "kernels"


def build(instruction_set: InstructionSet, folder: Path | None = None) -> Path:
    """Return the library of all kernels for `instruction_set`: what came with the installation, else from `folder`.

    Compiles it where it is in neither. Any number of processes may do so at once: one compiles, the others wait.

    Args:
        instruction_set: to compile for.
        folder: the cache; by default the user's.

    Raises:
        BuildError: there is no compiler, it fails, or the cache cannot be written, or can be by others; says which.
    """
    folder = folder or cache_dir()
    name = _name(instruction_set)
    if (INSTALLED / f"{name}.so").exists():
        return INSTALLED / f"{name}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise _unusable(folder, error) from error
    if found.st_uid not in (os.geteuid(), 0) or stat.S_IMODE(found.st_mode) & 0o022:
        raise BuildError(f"others can write to the cache {folder}, and what they put there would run: chmod 700 it")
    try:
        compiler = _compiler()
        library = folder / f"{name}-{_key([*compiler, _version(compiler), *sorted(cpu_flags() & RELEVANT_FLAGS)])}.so"
    except BuildError:
        built = sorted(folder.glob(f"{name}-*.so"))  # by a compiler that was here once, or is elsewhere
        if built:
            return built[0]
        raise
    try:
        if library.exists():
            return library
        with FileLock(library.with_suffix(".lock"), timeout=_TIMEOUT_S):
            if not library.exists():
                start = time.perf_counter()
                _compile(compiler, instruction_set, library)
                log.info(
                    "built kernels for %s with %s in %.1f s: %s",
                    instruction_set.name, shlex.join(compiler), time.perf_counter() - start, library,
                )  # fmt: skip
    except OSError as error:
        raise _unusable(folder, error) from error
    return library


def install() -> Path | None:
    """Compile the kernels that this machine would choose into the package; return the library, or None for NumPy.

    Raises:
        BuildError: there is no compiler, or it fails.
        ConfigError: as of `choose`.
    """
    instruction_set = choose(env.kernels(), cpu_flags())
    if instruction_set is None:
        return None
    compiler = _compiler()
    INSTALLED.mkdir(exist_ok=True)
    for old in INSTALLED.glob("*.so"):
        old.unlink()
    library = INSTALLED / f"{_name(instruction_set)}.so"
    _compile(compiler, instruction_set, library)
    return library


def _unusable(folder: Path, error: OSError) -> BuildError:
    return BuildError(f"the cache {folder} cannot be used: {error}")


def _compiler() -> list[str]:
    """Return the command of the C++ compiler: ``CXX``, else the system's."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"CXX={shlex.join(named)} is not on this machine" if named else "there is no C++ compiler")


def _version(compiler: list[str]) -> str:
    return _run([*compiler, "--version"])


def _name(instruction_set: InstructionSet) -> str:
    """Return what a library is called that these sources make: another for each change of them."""
    sources = [f"{path.name}\n{path.read_text()}" for path in sorted(SOURCES.iterdir())]
    made = _key([*sources, *OPTIONS, *instruction_set.options, platform.machine()])
    return f"{instruction_set.name}-{made}"


def _key(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], instruction_set: InstructionSet, library: Path) -> None:
    """Compile all sources to `library`, which appears whole or not at all."""
    command = [*compiler, *OPTIONS, *instruction_set.options]
    # beside the library, since a rename is one step within a file system only
    with tempfile.TemporaryDirectory(prefix=f".{library.stem}.", dir=library.parent) as scratch:
        made = Path(scratch, library.name)
        objects = compile_each(command, sorted(SOURCES.glob("*.cpp")), Path(scratch))
        _run([*command, "-shared", *objects, "-o", str(made)])
        if not made.exists():
            raise BuildError(f"{shlex.join(command)} ended well and wrote nothing")
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(library)


def compile_each(command: list[str], sources: Iterable[Path], folder: Path) -> list[str]:
    """Compile `sources` by `command`, as many at a time as there are cores, to objects in `folder`; return these."""
    pairs = [(str(source), str(folder / f"{source.stem}.o")) for source in sources]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda pair: _run([*command, "-c", pair[0], "-o", pair[1]]), pairs))
    return [made for _, made in pairs]


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
