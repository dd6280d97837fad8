"""Where the files of a known data set come from, and whether they are there and right.

The library only looks: bringing a package is the work of ``disttrain data NAME``.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from disttrain.env import data_dir
from disttrain.errors import DataError, DatasetMissingError

# Where a package's own client unpacks it, so that an installed package serves as it is.
_SYSTEM_ROOTS = {"apt": Path("/")}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that carries the files of a data set.

    Attributes:
        client: what brings it: ``"apt"``.
        name: the package's name.
        version: the one version whose files are known; None where any is tried.
        files: SHA-256 of each file that is needed, by its path inside the unpacked package.
    """

    client: str
    name: str
    version: str | None = None
    files: Mapping[str, str]

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"{self.client} package {self.name}{version}"


def cache_dir(package: Package) -> Path:
    """Return the folder under which fetched files of `package` are kept."""
    return data_dir() / f"{package.client}-{package.name}"


def find(dataset: str, package: Package) -> Path:
    """Return the folder under which all files of `package` are, after checking their SHA-256.

    Looks where the package itself would be installed, then in the cache.

    Args:
        dataset: the name of the data set, for messages.
        package: what to look for.

    Raises:
        DatasetMissingError: the files are nowhere.
        DataError: a file is not what it should be.
    """
    system = _SYSTEM_ROOTS.get(package.client)
    roots = [*([system] if system else []), cache_dir(package)]
    damage: list[str] = []
    for root in roots:
        if not all((root / path).is_file() for path in package.files):
            continue
        wrong = flaws(root, package)
        if not wrong:
            return root
        damage += wrong
    if damage:
        raise DataError(f"data set {dataset!r}: {damage[0]}; bring it anew with: disttrain data {dataset}")
    raise DatasetMissingError(
        f"data set {dataset!r} is not on this machine: looked for the files of {package} under "
        f"{' and '.join(map(str, roots))}; bring it with: disttrain data {dataset}"
    )


def flaws(root: Path, package: Package) -> list[str]:
    """Return a line for each file of `package` that is not as it should be under `root`."""
    lines = []
    for path, expected in package.files.items():
        if not (root / path).is_file():
            lines.append(f"{root / path} is missing")
            continue
        with (root / path).open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != expected:
            lines.append(f"{root / path} has SHA-256 {actual}, expected {expected}")
    return lines
