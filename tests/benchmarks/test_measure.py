"""Systems in processes of their own: what is measured, what is a gap, and that none is left."""

import psutil
import pytest

from benchmarks import workloads
from benchmarks.measure import ROUNDS, measure
from disttrain.errors import ConfigError

TOYS = "tests.benchmarks.toys"


@pytest.fixture(autouse=True)
def _no_process_is_left():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def measured(*names, limit_s=60.0):
    said = []
    samples = measure(workloads.get("W1"), names, seconds=0.01, limit_s=limit_s, say=said.append)
    assert said
    return samples


def test_disttrain_learns_w1_and_its_steps_are_timed():
    (sample,) = measured("disttrain")
    assert sample.gap == ""
    assert len(sample.ready["losses"]) == workloads.get("W1").learning_steps
    assert sample.ready["losses"][-1] < 0.5 * sample.ready["losses"][0]
    assert sample.ready["parameters"] == 784 * 128 + 128 + 128 * 10 + 10
    assert sample.ready["precision"] == "float32"
    assert 0 < sample.ready["product_error"] < 1e-5  # float32 sums of 1024 products
    assert len(sample.times) >= ROUNDS
    assert min(sample.times) > 0


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
    assert (bad.is_failure, bad.times) == (is_failure, [])
    assert (good.gap, len(good.times) >= ROUNDS) == ("", True)


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
