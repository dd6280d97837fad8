"""Files of a package are found where they may be, and none is taken that is not the right one."""

import hashlib
from pathlib import Path

import platformdirs
import pytest

from disttrain import env
from disttrain.data import package as package_module
from disttrain.data.package import Package, cache_dir, find
from disttrain.errors import DataError, DatasetMissingError

FILES = {"usr/share/toy/a.txt": b"first", "usr/share/toy/b.txt": b"second"}
PACKAGE = Package(
    client="apt",
    name="toy",
    files={path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()},
)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Let the cache and the system be two empty folders."""
    monkeypatch.setenv("DISTTRAIN_DATA", str(tmp_path / "cache"))
    monkeypatch.setitem(package_module._SYSTEM_ROOTS, "apt", tmp_path / "system")


def put(root, *, damaged=()):
    for path, content in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content[::-1] if path in damaged else content)


def test_the_cache_is_used():
    put(cache_dir(PACKAGE))
    assert find("toy", PACKAGE) == cache_dir(PACKAGE)


def test_an_installed_package_is_used_first(tmp_path):
    put(tmp_path / "system")
    put(cache_dir(PACKAGE))
    assert find("toy", PACKAGE) == tmp_path / "system"


def test_an_installed_package_of_another_version_does_not_hide_the_cache(tmp_path):
    put(tmp_path / "system", damaged=FILES)
    put(cache_dir(PACKAGE))
    assert find("toy", PACKAGE) == cache_dir(PACKAGE)


def test_a_missing_set_names_the_places_and_the_command(tmp_path):
    with pytest.raises(DatasetMissingError) as caught:
        find("toy", PACKAGE)
    message = str(caught.value)
    assert str(tmp_path / "system") in message
    assert str(cache_dir(PACKAGE)) in message
    assert message.endswith("disttrain data toy")


@pytest.mark.parametrize("path", FILES)
def test_a_set_of_which_a_file_is_missing_is_missing(path):
    put(cache_dir(PACKAGE))
    (cache_dir(PACKAGE) / path).unlink()
    with pytest.raises(DatasetMissingError):
        find("toy", PACKAGE)


@pytest.mark.parametrize("path", FILES)
def test_a_damaged_file_is_named_with_both_hashes_and_the_command(path):
    put(cache_dir(PACKAGE), damaged=[path])
    actual = hashlib.sha256(FILES[path][::-1]).hexdigest()
    with pytest.raises(DataError) as caught:
        find("toy", PACKAGE)
    message = str(caught.value)
    assert f"{cache_dir(PACKAGE) / path} has SHA-256 {actual}, expected {PACKAGE.files[path]}" in message
    assert message.endswith("disttrain data toy")


def test_the_cache_is_the_users_unless_a_variable_names_another_folder():
    assert env.data_dir({}) == platformdirs.user_cache_path("disttrain") / "datasets"
    assert env.data_dir({"DISTTRAIN_DATA": "/data"}) == Path("/data")
    assert env.data_dir({"DISTTRAIN_DATA": "data"}) == Path.cwd() / "data"
