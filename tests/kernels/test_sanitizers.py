"""The sources of kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over the same shapes as the tests."""

import itertools
import math
import re
import subprocess
from pathlib import Path

import pytest

from disttrain.kernels import build as builder
from disttrain.kernels.build import BuildError
from disttrain.kernels.instruction_sets import InstructionSet, cpu_flags, runnable
from tests.kernels.shapes import ATTENTIONS, CONVOLUTIONS, LENGTHS, POOLS, PRODUCTS, ROWS, SEQUENCES, WINOGRAD

DRIVER = Path(__file__).with_name("driver.cpp")
# -O1: half the time to compile; the loops and what they touch are the same
OPTIONS = ["-std=c++17", "-O1", "-g1", "-Wno-psabi", "-ffp-contract=off"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


# in place of matrix units, their model: see cpu/tiles.h
_WIDEST = runnable(cpu_flags())[0]
EMULATED = InstructionSet(name="emulated", flags=_WIDEST.flags, options=(*_WIDEST.options, "-DDISTTRAIN_EMULATE_TILES"))


def lines(instruction_set):
    if instruction_set is EMULATED:  # slow, and nothing else is computed with tiles
        yield from _products(most=3_000)
        return
    for s in CONVOLUTIONS + WINOGRAD:
        yield "convolution", s.images, *s.size, s.channels, *s.window, s.filters, *s.out, *s.strides, *_before(s)
    for s in POOLS:
        yield "pooling", s.images, *s.size, s.channels, *s.out, *s.window, *s.strides, *_before(s)
    yield from _products()
    for n in LENGTHS:
        yield "flat", n
    for shape in ROWS:
        yield "rows", *shape
    for s in ATTENTIONS:
        yield "attention", *s, 0, *(0,) * 5
        yield "attention", *s, 1, 1, s.queries * s.keys, 0, s.keys, 1
        yield "attention", *s, 0, 8, 0, 8 * s.keys, 0, 8
    for s in SEQUENCES:
        yield "recurrent", *s


def _products(most=math.inf):
    """Yield products of up to `most` terms, whose operands lie by rows, by columns, and apart."""
    for m, n, k in PRODUCTS:
        for a, b in itertools.product([(k, 1), (1, m), (3 * k, 2)], [(n, 1), (1, k), (3 * n, 2)]):
            if m * n * k <= most:
                yield "product", m, n, k, *a, *b


def _before(shape):
    return shape.padding[0][0], shape.padding[1][0]


def compiled(tmp_path, instruction_set, *sources, sanitizers=SANITIZERS):
    """Return the program of `sources`; skips where nothing can be compiled with sanitizers."""
    try:
        command = [*builder._compiler(), *OPTIONS, *sanitizers, *instruction_set.options]
        (tmp_path / "empty.cpp").write_text("int main() {}\n")
        builder._run([*command, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")])
        builder._run([str(tmp_path / "empty")])
    except BuildError as error:
        pytest.skip(f"nothing can be compiled with sanitizers here: {error}")
    objects = builder.compile_each(command, sources, tmp_path)
    builder._run([*command, *objects, "-o", str(tmp_path / "driver")])
    return tmp_path / "driver"


@pytest.mark.parametrize("instruction_set", [*runnable(cpu_flags()), EMULATED], ids=lambda each: each.name)
def test_kernels_touch_nothing_that_is_not_theirs(instruction_set, tmp_path):
    driver = compiled(tmp_path, instruction_set, DRIVER, *sorted(builder.SOURCES.glob("*.cpp")))
    text = "\n".join(" ".join(map(str, line)) for line in lines(instruction_set))
    done = subprocess.run([driver], input=text, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{len(text.splitlines())} lines\n"


def test_the_driver_would_notice(tmp_path):
    """Of a kernel that writes one element too many."""
    wrong = tmp_path / "wrong.cpp"
    declared = re.findall(r"^(void|int) (disttrain_\w+)\(([^;]*)\);", DRIVER.read_text(), re.MULTILINE)
    bodies = {"void": "{}", "int": "{ return 0; }"}
    others = [f"{kind} {name}({given}) {bodies[kind]}" for kind, name, given in declared if name != "disttrain_sgd"]
    assert len(others) == len(declared) - 1
    one = "void disttrain_sgd(int64_t n, float* w, const float*, float) { w[n] = 0; }"
    wrong.write_text("\n".join([f'#include "{DRIVER}"', 'extern "C" {', one, *others, "}"]))
    driver = compiled(tmp_path, runnable(frozenset())[-1], wrong)
    done = subprocess.run([driver], input="flat 5\n", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
