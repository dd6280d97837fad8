"""`disttrain data NAME`: bring a known data set to this machine.

A package client unpacks the package into a folder beside the cache; the files that are needed are
checked and moved into place in one step. A client is a function in `_CLIENTS`.
"""

import contextlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
from filelock import FileLock

from disttrain.data import datasets
from disttrain.data.package import Package, cache_dir, find, flaws
from disttrain.env import DATA_DIR
from disttrain.errors import (
    DataError,
    DatasetMissingError,
    DisttrainError,
    LaunchError,
    unknown_name,
)

# The backspace keeps click from joining the lines.
_EXAMPLES = """\b
Examples:
  disttrain data                  which there are, and which are here
  disttrain data fashion_mnist    bring one
"""


@click.command(epilog=_EXAMPLES)
@click.argument("name", required=False)
def data(name: str | None) -> None:
    """Bring the data set NAME to this machine; without NAME, list those that are known."""
    known = datasets.names()
    try:
        if name is None:
            for each in known:
                click.echo(f"{each}: {_state(each)}\n    {getattr(datasets, each).LICENSE}")
        elif name not in known:
            raise unknown_name("data set", name, known)
        else:
            click.echo(f"{name}: {_bring(name)}")
    except DisttrainError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error}; {DATA_DIR} names another folder to use") from error


def fetch(dataset: str, package: Package) -> Path:
    """Return the folder under which the files of `package` are, after bringing them where needed.

    Any number of processes may do so at once: one brings them, the others wait.

    Raises:
        LaunchError: the package's client is not on this machine, or failed.
        DataError: the package carries other files than were expected; none of them is kept.
    """
    target = cache_dir(package)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        with contextlib.suppress(DatasetMissingError, DataError):
            return find(dataset, package)
        for stale in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
            shutil.rmtree(stale)
        # Beside the target, since a rename is one step within a file system only.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            unpacked, kept = Path(scratch, "unpacked"), Path(scratch, "kept")
            try:
                _CLIENTS[package.client](package, unpacked)
            except LaunchError as error:
                raise LaunchError(f"{error}\n{_by_hand(package, target)}") from error
            _keep(package, unpacked, kept)
            if target.exists():
                target.rename(Path(scratch, "damaged"))
            kept.rename(target)
    return target


def _bring(dataset: str) -> str:
    """Bring `dataset` where it is not here yet, and return in words where it is."""
    module = getattr(datasets, dataset)
    if module.PACKAGE is None:
        return _state(dataset)
    with contextlib.suppress(DatasetMissingError, DataError):
        return f"already here, under {find(dataset, module.PACKAGE)}"
    click.echo(f"{dataset}: bringing {module.PACKAGE} ({module.LICENSE})", err=True)
    return f"now here, under {fetch(dataset, module.PACKAGE)}"


def _state(dataset: str) -> str:
    """Return in words whether `dataset` is here, and where."""
    package = getattr(datasets, dataset).PACKAGE
    if package is None:
        return "part of disttrain, always here"
    try:
        return f"here, under {find(dataset, package)}"
    except DatasetMissingError:
        return f"not here; bring it with: disttrain data {dataset}"
    except DataError as error:
        return f"damaged: {error}"


def _keep(package: Package, unpacked: Path, kept: Path) -> None:
    """Copy the files that are needed, once they are known to be right, from `unpacked` to `kept`."""
    wrong = flaws(unpacked, package)
    if wrong:
        raise DataError(f"{package} does not carry what was expected: {wrong[0]}; nothing was kept")
    for path in package.files:
        (kept / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(unpacked / path, kept / path)


def _apt(package: Package, unpacked: Path) -> None:
    """Unpack a Debian package; needs no root."""
    download = unpacked.with_name("download")
    download.mkdir()
    version = f"={package.version}" if package.version else ""
    advice = "where package lists are missing or old, run first: apt-get update"
    _run(["apt-get", "download", f"{package.name}{version}"], download, advice)
    archives = map(str, download.glob("*.deb"))
    _run(["dpkg-deb", "--extract", *archives, str(unpacked)], download, "the download may be damaged")


_CLIENTS: dict[str, Callable[[Package, Path], None]] = {"apt": _apt}


def _run(command: list[str], folder: Path, advice: str) -> None:
    """Run a package client in `folder`; its last lines are quoted when it fails."""
    tool = shutil.which(command[0])
    if tool is None:
        raise LaunchError(f"{command[0]} is not on this machine")
    done = subprocess.run(
        [tool, *command[1:]],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last = "".join(f"\n    {line}" for line in done.stdout.splitlines()[-5:])
        raise LaunchError(f"{shlex.join(command)} ended with exit code {done.returncode}; {advice}{last}")


def _by_hand(package: Package, target: Path) -> str:
    """Return what to do where no client can bring `package`."""
    files = "".join(f"\n    {target / path}" for path in package.files)
    return f"or take these files from the {package} yourself and put them there:{files}"
