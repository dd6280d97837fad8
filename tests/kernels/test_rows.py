"""Rows are copied and added up as the definitions do, to the bit; sums of all rows within a derived bound."""

import numpy as np
import pytest

from disttrain import Tensor, ops
from disttrain.autodiff.ops.embedding import _embedding_table
from disttrain.autodiff.plan import Plan, Trace
from disttrain.errors import DataError
from disttrain.kernels import rows
from tests.autodiff.test_plan import nowhere
from tests.kernels.shapes import ROWS

EVERY_SHAPE = pytest.mark.parametrize("shape", ROWS, ids=str)


@EVERY_SHAPE
@pytest.mark.parametrize("indices", [(), (0,), (40,), (5, 3)], ids=str)
def test_embedding_is_the_definition_to_the_bit(shape, indices, instruction_set, guarded):
    generator = np.random.default_rng(shape)
    table = generator.standard_normal(shape, dtype=np.float32)
    if not shape[0]:
        indices = (0,)
    numbers = np.asarray(generator.integers(0, max(shape[0], 1), indices))
    got = rows.embedding(numbers, guarded.copy(table)).run()
    np.testing.assert_array_equal(got, ops.embedding.definition(numbers, table))
    g = generator.standard_normal(got.shape, dtype=np.float32)
    g.flat[:1] = np.nan
    got = rows.embedding_table(guarded.copy(g), numbers, rows=shape[0]).run()
    np.testing.assert_array_equal(got, _embedding_table.definition(g, numbers, rows=shape[0]))


@pytest.mark.parametrize("wrong", [7, -1, 2**62])
def test_an_index_that_is_no_row_is_an_error_that_names_it_in_a_plan_too(wrong, instruction_set):
    table = Tensor(np.ones((7, 3), np.float32), requires_grad=True)

    def step(indices):
        ops.embedding(indices, table, name="words").sum().backward()
        return ops.embedding(Tensor(indices), table, name="words").data

    indices = np.array([[0, 6], [3, 3]])
    traces = []
    for _ in range(2):
        traces.append(Trace([indices], [table]))
        with traces[-1].running() as results:
            results.append(step(indices))
    assert traces[0].difference(traces[1]) == ""
    plan = Plan(traces[1], home=nowhere, final=nowhere)
    np.testing.assert_array_equal(plan.run([indices])[0], np.ones((2, 2, 3)))
    indices[1, 0] = wrong
    for compute in (lambda: plan.run([indices]), lambda: step(indices)):
        with pytest.raises(DataError, match=f"words: index {wrong} of sample 1 is none of the rows 0 to 6"):
            compute()


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32"])
def test_other_indices_are_the_definition_s(dtype, instruction_set):
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    indices = np.array([2, 0], dtype)
    assert rows.embedding(indices, table) is None
    np.testing.assert_array_equal(ops.embedding(indices, table), table[[2, 0]])


@EVERY_SHAPE
def test_sum_of_rows(shape, instruction_set, guarded, monkeypatch):
    monkeypatch.setattr(rows, "_FEWEST", 0)
    x = np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)
    got = rows.sum_to(guarded.copy(x), shape=shape[1:]).run()
    # Higham, "Accuracy and stability of numerical algorithms", (3.5): a sum of n terms in any order
    bound = (shape[0] + 1) * 2.0**-24 * np.abs(x.astype(float)).sum(0)
    assert (np.abs(got - x.astype(float).sum(0)) <= bound).all()


@pytest.mark.parametrize(
    ("shape", "to"),
    [
        ((3, 4, 5), (5,)), ((3, 4, 5), (4, 5)), ((3, 4, 5), (1, 5)), ((3, 4, 5), (1, 1, 5)), ((3, 4, 5), (1, 4, 5)),
        ((3, 4, 5), ()), ((3, 4, 5), (1,)), ((0, 3), (3,)), ((1, 3), (3,)),
    ],
)  # fmt: skip
def test_sums_over_the_first_axes_have_a_kernel(shape, to, instruction_set, monkeypatch):
    monkeypatch.setattr(rows, "_FEWEST", 0)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    got = rows.sum_to(x, shape=to).run()
    assert got.shape == to
    np.testing.assert_array_equal(got, ops.sum_to.definition(x, shape=to))


@pytest.mark.parametrize(
    ("shape", "to"), [((3, 4, 5), (3, 4, 5)), ((3, 4, 5), (3, 1, 5)), ((3, 4, 5), (4, 1)), ((3, 4, 5), (3, 4, 1))]
)
def test_other_sums_are_the_definition_s(shape, to, instruction_set, monkeypatch):
    monkeypatch.setattr(rows, "_FEWEST", 0)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert rows.sum_to(x, shape=to) is None
    np.testing.assert_array_equal(ops.sum_to(x, shape=to), ops.sum_to.definition(x, shape=to))
