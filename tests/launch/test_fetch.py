"""Fetching a data set, with a stand-in for apt-get that hands out a package made here."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from disttrain.data.datasets import fashion_mnist
from disttrain.data.package import Package, cache_dir, find
from disttrain.errors import DataError, LaunchError
from launch.fetch import data, fetch

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")

WANTED = "usr/share/toy/wanted.txt"
CONTENT = b"a data set\n"
PACKAGE = Package(
    client="apt",
    name="disttrain-toy",
    version="1.0-1",
    files={WANTED: hashlib.sha256(CONTENT).hexdigest()},
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Let the cache be an empty folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DISTTRAIN_DATA", str(folder))
    return folder


@pytest.fixture
def apt(tmp_path, monkeypatch, cache):
    """Put a stand-in for apt-get on the path; call the fixture to say what the package has."""
    tools = tmp_path / "tools"
    tools.mkdir()
    archive, calls = tmp_path / "toy.deb", tmp_path / "calls"
    script = tools / "apt-get"
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nsleep 0.2\ncp {archive} ./toy.deb\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    def has(files):
        tree = tmp_path / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            "Package: disttrain-toy\nVersion: 1.0-1\nArchitecture: all\nMaintainer: none <none@none>\n"
            "Description: toy\n"
        )
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(content)
        command = ["dpkg-deb", "--root-owner-group", "--build", tree, archive]
        subprocess.run(command, check=True, capture_output=True)

    has.script = script
    has.calls = lambda: calls.read_text().splitlines() if calls.exists() else []
    has({WANTED: CONTENT, "usr/share/toy/unwanted.txt": b"ballast"})
    return has


def kept(cache):
    """Return all files and folders in the cache but the lock."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.suffix != ".lock")


def test_only_the_wanted_files_are_kept(apt, cache):
    root = fetch("toy", PACKAGE)
    assert root == cache_dir(PACKAGE) == find("toy", PACKAGE)
    assert (root / WANTED).read_bytes() == CONTENT
    assert [path for path in kept(cache) if path.endswith(".txt")] == [f"apt-disttrain-toy/{WANTED}"]
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []
    assert apt.calls() == ["download disttrain-toy=1.0-1"]


def test_what_is_here_is_not_fetched_again(apt, cache):
    fetch("toy", PACKAGE)
    fetch("toy", PACKAGE)
    assert len(apt.calls()) == 1


def test_a_damaged_copy_is_replaced(apt, cache):
    (fetch("toy", PACKAGE) / WANTED).write_bytes(b"damaged")
    assert (fetch("toy", PACKAGE) / WANTED).read_bytes() == CONTENT
    assert len(apt.calls()) == 2


def test_what_a_killed_process_left_is_cleared_away(apt, cache):
    stale = cache / ".apt-disttrain-toy.abc" / "unpacked"
    stale.mkdir(parents=True)
    fetch("toy", PACKAGE)
    assert not stale.parent.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({WANTED: b"another content"}, "has SHA-256 .*, expected "),
        ({"usr/share/toy/renamed.txt": CONTENT}, "wanted.txt is missing"),
    ],
)
def test_a_package_with_other_files_is_refused_and_nothing_is_left(apt, cache, files, message):
    apt(files)
    with pytest.raises(DataError, match=message):
        fetch("toy", PACKAGE)
    assert kept(cache) == []


def test_a_link_to_the_right_content_becomes_a_file(apt, cache, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_bytes(CONTENT)
    apt({})
    link = tmp_path / "tree" / WANTED
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    command = ["dpkg-deb", "--root-owner-group", "--build", tmp_path / "tree", tmp_path / "toy.deb"]
    subprocess.run(command, check=True, capture_output=True)
    assert not (fetch("toy", PACKAGE) / WANTED).is_symlink()


def test_a_client_that_fails_is_quoted_with_advice_and_the_way_by_hand(apt, cache):
    apt.script.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    with pytest.raises(LaunchError) as caught:
        fetch("toy", PACKAGE)
    message = str(caught.value)
    assert "apt-get download disttrain-toy=1.0-1 ended with exit code 100" in message
    assert "apt-get update" in message
    assert "E: Unable to locate package" in message
    assert str(cache / "apt-disttrain-toy" / WANTED) in message
    assert kept(cache) == []


def test_a_missing_client_names_the_way_by_hand(apt, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError) as caught:
        fetch("toy", PACKAGE)
    assert str(caught.value).startswith("apt-get is not on this machine")
    assert str(cache / "apt-disttrain-toy" / WANTED) in str(caught.value)


def test_files_put_by_hand_serve(cache):
    (cache_dir(PACKAGE) / WANTED).parent.mkdir(parents=True)
    (cache_dir(PACKAGE) / WANTED).write_bytes(CONTENT)
    assert fetch("toy", PACKAGE) == cache_dir(PACKAGE)


def test_of_many_processes_one_fetches(apt, cache):
    program = (
        "from launch.fetch import fetch; from tests.launch.test_fetch import PACKAGE, WANTED; "
        "print((fetch('toy', PACKAGE) / WANTED).read_text(), end='')"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(3)]
    output = [process.communicate(timeout=60)[0] for process in running]
    assert output == [CONTENT] * 3
    assert len(apt.calls()) == 1


@pytest.fixture
def toy_fashion(monkeypatch):
    """Let fashion_mnist be the toy package."""
    monkeypatch.setattr(fashion_mnist, "PACKAGE", PACKAGE)


def test_the_command_brings_a_set_once(apt, cache, toy_fashion):
    first = CliRunner().invoke(data, ["fashion_mnist"])
    again = CliRunner().invoke(data, ["fashion_mnist"])
    assert (first.exit_code, again.exit_code) == (0, 0)
    assert f"fashion_mnist: now here, under {cache_dir(PACKAGE)}" in first.output
    assert again.output == f"fashion_mnist: already here, under {cache_dir(PACKAGE)}\n"


def test_the_command_lists_what_is_known_with_licence_and_state(apt, cache, toy_fashion):
    def line():
        result = CliRunner().invoke(data, [])
        assert result.exit_code == 0
        assert fashion_mnist.LICENSE in result.output
        assert "digits: part of disttrain, always here" in result.output
        return next(line for line in result.output.splitlines() if line.startswith("fashion_mnist"))

    assert line() == "fashion_mnist: not here; bring it with: disttrain data fashion_mnist"
    fetch("fashion_mnist", PACKAGE)
    assert line() == f"fashion_mnist: here, under {cache_dir(PACKAGE)}"
    (cache_dir(PACKAGE) / WANTED).write_bytes(b"damaged")
    assert line().startswith("fashion_mnist: damaged: ")


def test_the_help_shows_each_example_on_a_line():
    lines = CliRunner().invoke(data, ["--help"]).output.splitlines()
    assert "    disttrain data fashion_mnist    bring one" in lines
    assert not any("\\b" in line for line in lines)


def test_the_command_says_that_an_embedded_set_is_here(cache):
    result = CliRunner().invoke(data, ["digits"])
    assert (result.exit_code, result.output) == (0, "digits: part of disttrain, always here\n")


def test_the_command_fails_in_words(apt, cache, toy_fashion):
    unknown = CliRunner().invoke(data, ["fashion"])
    assert unknown.exit_code == 1
    assert "unknown data set 'fashion'; did you mean 'fashion_mnist'?" in unknown.output
    apt({WANTED: b"another content"})
    refused = CliRunner().invoke(data, ["fashion_mnist"])
    assert refused.exit_code == 1
    assert "Error: apt package disttrain-toy 1.0-1 does not carry what was expected" in refused.output
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    blocked = CliRunner().invoke(data, ["fashion_mnist"])
    assert blocked.exit_code == 1
    assert "DISTTRAIN_DATA names another folder" in blocked.output
