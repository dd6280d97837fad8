"""The precision of matrix products is chosen by name, for the process, and a plan has the one it was prepared with."""

import numpy as np
import pytest

import disttrain as dt
from disttrain.env import MATMUL_PRECISION
from disttrain.errors import ConfigError
from disttrain.kernels import precision


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(precision, "_chosen", "")
    monkeypatch.delenv(MATMUL_PRECISION, raising=False)


def test_the_default_is_the_highest_the_environment_says_another_and_the_program_has_the_last_word(monkeypatch):
    assert dt.get_matmul_precision() == "highest"
    monkeypatch.setenv(MATMUL_PRECISION, "medium")
    assert dt.get_matmul_precision() == "medium"
    dt.set_matmul_precision("high")
    assert dt.get_matmul_precision() == "high"


def test_a_name_that_does_not_exist_is_an_error_that_names_those_that_do(monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'highest'"):
        dt.set_matmul_precision("higest")
    assert dt.get_matmul_precision() == "highest"
    monkeypatch.setenv(MATMUL_PRECISION, "bf16")
    with pytest.raises(ConfigError, match=r"unknown matmul precision 'bf16'.*Known: high, highest, medium"):
        dt.get_matmul_precision()


def test_another_precision_takes_effect_in_the_next_step_of_a_model_that_has_a_plan():
    model = dt.Sequential([dt.layers.Dense(3, input_shape=(4,))])
    model.compile(optimizer="sgd", loss="mean_squared_error")
    x, y = np.ones((5, 4), np.float32), np.ones((5, 3), np.float32)
    for _ in range(3):
        model.train_on_batch(x, y)
    step = next(iter(model._replicas.values())).steps[0]
    assert len(step.training.plans) == 1
    dt.set_matmul_precision("medium")
    for _ in range(3):
        model.train_on_batch(x, y)
    assert len(step.training.plans) == 2
