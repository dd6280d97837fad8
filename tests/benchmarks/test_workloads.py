"""The workloads, and disttrain's models of them."""

import numpy as np
import pytest

import disttrain as dt
from benchmarks import systems, tasks, workloads
from benchmarks.architecture import initial_weights
from benchmarks.machine import describe, in_words
from benchmarks.systems import AbsentError
from benchmarks.systems import disttrain as system
from disttrain.errors import ConfigError
from disttrain.kernels.instruction_sets import choose
from disttrain.kernels.library import Choice

# From the layers' formulas; W4 is the number that is published for this form of ResNet-18.
PARAMETERS = {"W1": 101_770, "W2": 1_863_690, "W3": 1_199_882, "W4": 11_173_962, "W5": 3_323_392}


def test_names_are_those_of_the_files():
    assert workloads.names() == list(PARAMETERS)
    peers = ["jax", "keras", "onnxruntime", "tensorflow", "torch", "torch_compile", "torch_ddp"]
    assert systems.names() == ["disttrain", *peers]


@pytest.mark.parametrize("name", PARAMETERS)
def test_data_and_weights_are_always_the_same(name):
    workload = workloads.get(name)
    assert workload.parameters() == PARAMETERS[name]
    assert all(np.array_equal(a, b) for a, b in zip(workload.batch(), workload.batch(), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(workload.weights(), workload.weights(), strict=True))
    assert {array.dtype for array in workload.weights()} == {np.dtype("float32")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_disttrain_builds_the_model_from_the_same_weights(name):
    workload = workloads.get(name)
    assert system.build(workload, "defaults").parameters == PARAMETERS[name]


def test_weights_reach_the_layers_that_they_are_for():
    part = workloads.get("W1").parts
    model = dt.Sequential(system._layers(part))
    x, _ = workloads.get("W1").batch()
    model(x[:0])
    kernel, bias, *_ = initial_weights(part, np.random.default_rng(0))
    for weight, array in zip(model.weights, initial_weights(part, np.random.default_rng(0)), strict=True):
        weight.data[...] = array
    first = np.maximum(x @ kernel + bias, 0)
    np.testing.assert_allclose(model.layers[0](x).numpy(), first, rtol=1e-5, atol=1e-5)


def test_unknown_names_have_the_nearest_right_one():
    assert workloads.get("w3").name == "W3"
    with pytest.raises(ConfigError, match=r"unknown workload 'W33'; did you mean 'w3'\?"):
        workloads.get("W33")
    with pytest.raises(ConfigError, match=r"unknown system 'tensorflw'; did you mean 'tensorflow'\?"):
        systems.module_name("tensorflw")


def test_a_form_sets_what_disttrain_reads():
    assert systems.environment("disttrain") == systems.environment("torch") == {}
    found = systems.environment("disttrain:high:avx2")
    assert found == {"DISTTRAIN_MATMUL_PRECISION": "high", "DISTTRAIN_KERNELS": "avx2"}
    assert systems.module_name("disttrain:high:avx2") == "benchmarks.systems.disttrain"
    assert {"disttrain:high", "disttrain:medium", "disttrain:portable", "disttrain:numpy"} <= set(systems.forms())
    with pytest.raises(ConfigError, match=r"unknown form 'hihg'; did you mean 'high'\?"):
        systems.environment("disttrain:hihg")
    with pytest.raises(ConfigError, match="'torch:high': only disttrain has forms"):
        systems.environment("torch:high")


def test_kernels_that_are_not_to_be_had_are_a_gap(monkeypatch):
    monkeypatch.setenv("DISTTRAIN_KERNELS", "portable")
    monkeypatch.setattr(system, "chosen", lambda: Choice(name="numpy", reason="no compiler", functions={}))
    with pytest.raises(AbsentError, match="there are no kernels for portable: no compiler"):
        system.load()
    monkeypatch.setattr(system, "chosen", lambda: choose("avx512", frozenset()))
    with pytest.raises(AbsentError, match="this CPU lacks"):
        system.load()


def test_an_enlarged_workload_has_the_same_model_and_more_samples():
    workload = workloads.get("W5")
    x, y = workload.enlarged(3).batch()
    assert (x.shape, y.shape) == ((24, 128), (24, 128))
    assert workload.enlarged(3).parts == workload.parts


def test_epochs_of_disttrain_learn_what_there_is_to_learn(monkeypatch):
    generator = np.random.default_rng(0)

    def images(n):  # the class is where it is bright
        y = generator.integers(10, size=n)
        x = generator.integers(100, size=(n, 28, 28))
        x[np.arange(n), 2 * y] += 100
        return x.astype(np.uint8), y.astype(np.uint8)

    monkeypatch.setattr(dt.datasets.fashion_mnist, "load_data", lambda: (images(2000), images(500)))
    assignment = tasks.Assignment(module=system.__name__, workload=workloads.get("W1"), workers=1, started_s=0.0)
    ready, epochs = tasks.get("epoch").prepare(assignment)
    assert ready["samples"] == 2000
    answer = epochs(0.0)
    assert len(answer["values"]) == 1
    assert answer["test_accuracy"] > 0.9


def test_the_machine_is_described_by_what_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 amx_tile avx512f\n")
    machine = describe(cpuinfo)
    assert (machine["cpu"], machine["flags"]) == ("A CPU", ["avx2", "avx512f", "amx_tile"])
    assert "OPENBLAS_CORETYPE=Haswell" in in_words(machine)
    assert describe(tmp_path / "none")["flags"] == []
