"""Kernels are built once, whoever asks; where they cannot be, NumPy computes and the log says why."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from disttrain import ops
from disttrain.env import KERNELS
from disttrain.errors import ConfigError
from disttrain.kernels import build as builder
from disttrain.kernels import library
from disttrain.kernels.build import BuildError, build
from disttrain.kernels.instruction_sets import choose, cpu_flags, runnable

PORTABLE = runnable(frozenset())[-1]
AVX2 = frozenset({"avx2", "fma"})
AVX512 = AVX2 | {"avx512f", "avx512vl", "avx512bw", "avx512dq"}
POOL = {"size": (2, 2), "strides": (2, 2), "padding": ((0, 0), (0, 0))}


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(builder, "INSTALLED", tmp_path / "installed")
    monkeypatch.delenv(KERNELS, raising=False)
    library.chosen.cache_clear()
    yield
    library.chosen.cache_clear()


@pytest.fixture
def _compiler():
    try:
        builder._compiler()
    except BuildError as error:
        pytest.skip(f"no kernels here: {error}")


def pooled():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(ops.max_pool2d(x, **POOL).ravel(), [5, 7, 13, 15])


@pytest.mark.parametrize(
    ("wanted", "flags", "name"),
    [
        ("", AVX512 | {"amx_tile", "amx_bf16"}, "amx"),
        ("", AVX512 | {"amx_tile"}, "avx512"),
        ("", AVX512 | {"sse2"}, "avx512"),
        ("", AVX512 - {"avx512vl"}, "avx2"),
        ("", AVX2 - {"fma"}, "portable"),
        ("", frozenset(), "portable"),
        ("avx2", AVX512, "avx2"),
        ("portable", AVX512, "portable"),
    ],
)
def test_the_widest_that_the_cpu_has_is_chosen_unless_another_is_asked_for(wanted, flags, name):
    assert choose(wanted, flags).name == name


def test_numpy_can_be_asked_for_anywhere(monkeypatch):
    assert choose("numpy", AVX512) is None
    monkeypatch.setenv(KERNELS, "numpy")
    monkeypatch.setattr(library, "build", lambda _: pytest.fail("built"))
    pooled()
    assert library.chosen().name == "numpy"
    assert library.chosen().reason == ""


@pytest.mark.parametrize("wanted", ["sse9", "amx3", "AVX2", "avx512 "])
def test_a_name_that_does_not_exist_is_an_error_that_names_those_that_do(wanted):
    with pytest.raises(ConfigError, match=f"DISTTRAIN_KERNELS={wanted}.*possible here: numpy, portable, avx2$"):
        choose(wanted, AVX2)


def test_an_instruction_set_that_the_cpu_lacks_is_an_error_that_names_what_it_lacks():
    with pytest.raises(ConfigError, match="lacks avx512bw, avx512dq, avx512f, avx512vl; possible here: numpy, port"):
        choose("avx512", AVX2)


def test_the_error_comes_from_the_first_op_that_could_use_a_kernel(monkeypatch):
    monkeypatch.setenv(KERNELS, "sse9")
    with pytest.raises(ConfigError, match="sse9"):
        pooled()


def test_flags_are_those_of_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nvmx flags\t: ept\n\nprocessor\t: 1\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "fma"}
    assert cpu_flags(tmp_path / "absent") == frozenset()


@pytest.mark.usefixtures("_compiler")
def test_four_processes_that_start_at_once_build_one_library(tmp_path):
    # all wait until all are there; then each builds, loads and computes
    script = (
        "import sys, time, pathlib, numpy as np; from disttrain import ops\n"
        "from disttrain.kernels import build, library\n"
        "folder = pathlib.Path(sys.argv[1]); (folder / sys.argv[2]).touch(); build.INSTALLED = folder\n"
        "while len(list(folder.iterdir())) < 4: time.sleep(0.001)\n"
        "x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)\n"
        "y = ops.max_pool2d(x, size=(2, 2), strides=(2, 2), padding=((0, 0), (0, 0)))\n"
        "print(library.chosen().path, y.ravel().tolist())\n"
    )
    present = tmp_path / "present"
    present.mkdir()
    environ = {**os.environ, KERNELS: "portable"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(present), str(rank)], env=environ, stdout=subprocess.PIPE, text=True
        )
        for rank in range(4)
    ]
    said = {worker.communicate(timeout=100)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0] * 4
    (made,) = (tmp_path / "cache" / "disttrain" / "kernels").glob("*.so")
    assert said == {f"{made} [5.0, 7.0, 13.0, 15.0]\n"}
    assert sorted(made.parent.iterdir()) == [made.with_suffix(".lock"), made]  # nothing half done is left


@pytest.mark.usefixtures("_compiler")
def test_a_library_is_built_once_and_again_when_something_changes(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "disttrain"):
        first = build(PORTABLE, tmp_path)
        assert build(PORTABLE, tmp_path) == first
    assert [r.getMessage().split(" in ")[0] for r in caplog.records] == [
        f"built kernels for portable with {' '.join(builder._compiler())}"
    ]
    for change in (
        lambda m: m.setattr(builder, "OPTIONS", (*builder.OPTIONS, "-DOTHER")),
        lambda m: m.setattr(builder, "_version", lambda _: "99"),
        lambda m: m.setattr(builder, "cpu_flags", lambda: frozenset({"fma"})),
        lambda m: m.setattr(builder, "SOURCES", Path(__file__).parent),
    ):
        with monkeypatch.context() as changed:
            change(changed)
            changed.setattr(builder, "_compile", lambda _compiler, _instruction_set, path: path.touch())
            assert build(PORTABLE, tmp_path) != first


@pytest.mark.usefixtures("_compiler")
def test_what_was_built_at_installation_serves_without_a_compiler_until_sources_change(tmp_path, monkeypatch):
    monkeypatch.setenv(KERNELS, "portable")
    old = tmp_path / "installed" / "portable-old.so"
    old.parent.mkdir()
    old.touch()
    library = builder.install()
    assert list(old.parent.iterdir()) == [library]
    monkeypatch.setenv("CXX", "/bin/false")
    assert build(PORTABLE, tmp_path) == library
    pooled()
    with monkeypatch.context() as changed:
        changed.setattr(builder, "OPTIONS", (*builder.OPTIONS, "-DOTHER"))
        with pytest.raises(BuildError, match="/bin/false"):
            build(PORTABLE, tmp_path)


def test_nothing_is_built_at_installation_for_numpy(tmp_path, monkeypatch):
    monkeypatch.setenv(KERNELS, "numpy")
    assert builder.install() is None
    assert not (tmp_path / "installed").exists()


@pytest.mark.usefixtures("_compiler")
def test_a_library_in_the_cache_serves_when_the_compiler_is_gone(tmp_path, monkeypatch):
    library = build(PORTABLE, tmp_path)
    monkeypatch.setenv("CXX", "c++-99")
    assert build(PORTABLE, tmp_path) == library


def refused(caplog):
    """Compute twice by NumPy, and return the one warning that says why."""
    for _ in range(2):
        pooled()
    (record,) = [r for r in caplog.records if r.name == "disttrain"]
    assert record.levelno == logging.WARNING
    assert library.chosen().name == "numpy"
    assert library.chosen().reason in record.getMessage()
    return record.getMessage()


def test_a_compiler_that_fails_leaves_the_work_to_numpy_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/bin/false")
    assert "NumPy computes, slower: /bin/false ended with exit code 1" in refused(caplog)


def test_an_error_of_the_compiler_is_quoted(monkeypatch, caplog, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ntest "$1" = --version || { echo "no such option: $1"; exit 3; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "ended with exit code 3\n    no such option: -std=c++17" in refused(caplog)
    assert not list(tmp_path.rglob("*.so"))


def test_without_a_compiler_numpy_computes(monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no C++ compiler" in refused(caplog)


def test_a_compiler_that_is_named_and_absent_is_named(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "c++-99 -pipe")
    assert "CXX=c++-99 -pipe is not on this machine" in refused(caplog)


@pytest.mark.usefixtures("_compiler")
def test_a_cache_that_cannot_be_written_leaves_the_work_to_numpy(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot be used" in refused(caplog)


@pytest.mark.usefixtures("_compiler")
def test_a_damaged_library_leaves_the_work_to_numpy_and_is_named(monkeypatch, caplog):
    monkeypatch.setenv(KERNELS, "portable")
    path = build(PORTABLE)
    path.write_bytes(b"not a library")
    assert f"{path} cannot be loaded" in refused(caplog)


def test_importing_disttrain_loads_no_kernels():
    script = (
        "import disttrain as dt; dt.Tensor; from disttrain.kernels import library; print(library.chosen.cache_info())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "misses=0" in done.stdout


def test_memory_that_a_kernel_lacks_is_an_error():
    function = library.chosen().functions.get("conv2d")
    if function is None:
        pytest.skip("no kernels here")
    with pytest.raises(MemoryError, match="disttrain_conv2d"):
        function.errcheck(1, function, ())
