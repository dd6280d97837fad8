"""Every test of a kernel runs for each instruction set that this machine can run."""

import pytest

from disttrain.env import KERNELS
from disttrain.kernels import (
    attention,
    batch_norm,
    convolution,
    elementwise,
    gelu,
    layer_norm,
    library,
    matmul,
    pooling,
    recurrent,
    rows,
    softmax,
)
from disttrain.kernels.build import BuildError, build
from disttrain.kernels.instruction_sets import cpu_flags, runnable
from tests.kernels.guarded import Guarded


@pytest.fixture(params=[each.name for each in runnable(cpu_flags())])
def instruction_set(request, monkeypatch):
    """Make one instruction set the one whose kernels compute."""
    chosen = next(each for each in runnable(cpu_flags()) if each.name == request.param)
    try:
        build(chosen)
    except BuildError as error:
        pytest.skip(f"no kernels here: {error}")
    monkeypatch.setenv(KERNELS, chosen.name)
    library.chosen.cache_clear()
    assert library.chosen().name == chosen.name
    yield chosen
    library.chosen.cache_clear()


@pytest.fixture
def guarded(monkeypatch):
    """Give kernels arrays between guard bytes, for results too; at the end none of those has changed."""
    guards = Guarded()
    for module in (
        attention, batch_norm, convolution, elementwise, gelu, layer_norm, matmul, pooling, recurrent, rows, softmax,
    ):  # fmt: skip
        monkeypatch.setattr(module, "new_array", guards.new_array)
    yield guards
    guards.check()
