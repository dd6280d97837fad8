"""Systems in processes of their own: what is measured, what is a gap, and that none is left."""

import os

import numpy as np
import psutil
import pytest

from benchmarks import tasks, workloads
from benchmarks.building import cross_entropy
from benchmarks.measure import measure
from benchmarks.tasks.memory import resident
from disttrain.errors import ConfigError

ROUNDS = tasks.get("step").rounds
TOYS = "tests.benchmarks.toys"


@pytest.fixture(autouse=True)
def _no_process_is_left():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def measured(*names, task="step", limit_s=60.0, **how):
    said = []
    how = {"seconds": 0.01, "limit_s": limit_s, **how}
    samples = measure(tasks.get(task), workloads.get("W1"), names, say=said.append, **how)
    assert said
    return samples


def test_disttrain_learns_w1_and_its_steps_are_timed():
    (sample,) = measured("disttrain")
    assert sample.gap == ""
    assert len(sample.ready["losses"]) == workloads.get("W1").learning_steps
    assert sample.ready["losses"][-1] < 0.5 * sample.ready["losses"][0]
    assert sample.ready["parameters"] == 784 * 128 + 128 + 128 * 10 + 10
    assert sample.ready["precision"] == "highest"
    assert 0 < sample.ready["product_error"] < 1e-5  # float32 sums of 784 products
    assert len(sample.values) >= ROUNDS
    assert min(sample.values) > 0


def test_a_form_of_disttrain_computes_as_its_name_says():
    plain, other = measured("disttrain:numpy", "disttrain:high:portable")
    assert (plain.ready["precision"], plain.ready["variant"]) == ("highest", "numpy")
    if other.gap:  # without a compiler
        assert "there are no kernels for portable" in other.gap
    else:
        assert (other.ready["precision"], other.ready["variant"]) == ("high", "portable")


def test_predictions_are_those_of_the_initial_weights():
    (sample, toy) = measured("disttrain", f"{TOYS}.good", task="predict")
    w1 = workloads.get("W1")
    x, y = w1.enlarged(4).batch()
    first, first_bias, second, second_bias = (array.astype(np.float64) for array in w1.weights())
    logits = np.maximum(x @ first + first_bias, 0) @ second + second_bias
    assert sample.ready["losses"] == [pytest.approx(cross_entropy(logits, y), rel=1e-5)]
    assert sample.ready["samples"] == 4 * 128
    assert len(sample.values) >= tasks.get("predict").rounds
    assert (toy.gap, toy.is_failure) == ("there is no predict of this system here", False)


def test_cross_entropy_is_that_of_its_formula():
    generator = np.random.default_rng(0)
    logits, labels = 100 * generator.standard_normal((2, 5, 3)), generator.integers(3, size=(2, 5))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = [probabilities[i, j, labels[i, j]] for i in range(2) for j in range(5)]
    assert cross_entropy(logits, labels) == pytest.approx(-np.mean(np.log(chosen)))


def test_memory_is_the_peak_of_a_fresh_process_and_what_it_is_above_the_imports():
    small, big = (
        measure(tasks.get("memory"), workloads.get(name), ["disttrain"], seconds=0, limit_s=60, say=len, rounds=1)[0]
        for name in ("W1", "W2")
    )
    for sample in (small, big):
        (peak,) = sample.values
        assert peak == pytest.approx(2**20 * (sample.ready["imported_mib"] + sample.ready["above_mib"]))
    # weights, gradients, and two slots of Adam, float32
    state_mib = 4 * 4 * (workloads.get("W2").parameters() - workloads.get("W1").parameters()) / 2**20
    assert big.ready["above_mib"] - small.ready["above_mib"] > state_mib


def test_resident_memory_is_what_the_system_says(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert (resident("VmHWM", status), resident("VmRSS", status)) == (2**21, 2**20)
    assert resident("VmHWM", tmp_path / "none") > 2**20


def test_the_parts_of_a_start_add_up():
    (sample,) = measured("disttrain", task="start", rounds=1)
    (whole,) = sample.values
    parts = [sample.ready[key] for key in tasks.get("start").columns]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(1e3 * whole)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_two_workers_have_a_batch_each():
    alone, both = measured("disttrain", task="scaling", rounds=2, workers=(1, 2))
    assert (alone.gap, both.gap) == ("", "")
    assert (alone.ready["samples"], both.ready["samples"]) == (128, 256)
    assert (len(alone.values), len(both.values)) == (2, 2)  # one a job
    shares = [both.ready[name] for name in ("compute", "communication", "waiting", "data")]
    assert all(0 <= share <= 1 for share in shares)
    assert both.ready["compute"] > 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_two_workers_may_divide_a_batch():
    (both,) = measured("disttrain", task="scaling_strong", rounds=1, workers=(2,))
    assert (both.gap, both.ready["samples"]) == ("", 128)


def test_a_system_without_workers_is_a_gap():
    (sample,) = measured(f"{TOYS}.good", task="scaling", rounds=1)
    assert (sample.gap, sample.is_failure) == ("there is no data-parallel form of this system here", False)


@pytest.mark.parametrize(
    ("name", "reason", "is_failure"),
    [
        ("missing", "a_framework_that_is_not_there is not installed", False),
        ("bare", "there is no attention here", False),
        ("forgetful", "the loss does not fall: 3.0000, after 20 steps 3.0000", True),
        ("small", "the model has 101769 parameters, the workload 101770", True),
        ("crashing", "was ended by SIGSEGV", True),
        ("not_there", f"No module named '{TOYS}.not_there'", True),
    ],
)
def test_what_gives_no_figure_is_a_gap_that_says_why(name, reason, is_failure):
    bad, good = measured(f"{TOYS}.{name}", f"{TOYS}.good")
    assert reason in bad.gap
    assert (bad.is_failure, bad.values) == (is_failure, [])
    assert (good.gap, len(good.values) >= ROUNDS) == ("", True)


def test_one_that_hangs_is_ended_at_the_limit():
    (sample,) = measured(f"{TOYS}.hanging", limit_s=1.0)
    assert sample.is_failure
    assert sample.gap.startswith("took more than 1 s to get ready")


def test_systems_that_train_different_models_are_not_compared():
    samples = measured(f"{TOYS}.good", f"{TOYS}.other")
    assert all("another model" in sample.gap for sample in samples)


def test_an_unknown_system_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown system 'torhc'; did you mean 'torch'\?"):
        measured("torhc")
