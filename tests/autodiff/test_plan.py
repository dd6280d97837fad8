"""A plan made of two traces of a step gives the bits of the step itself, on any inputs."""

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain import Tensor, no_grad, op, ops
from disttrain.autodiff.op import tracing
from disttrain.autodiff.plan import Block, Plan, _late, _place
from disttrain.autodiff.trace import Trace, TracedCall
from tests.autodiff.cases import CASES


def nowhere(parameter):
    raise AssertionError("no gradient of a parameter was traced")


def step_of(function):
    """Return a step: from arrays to the value of `function`, and its gradients in all of them."""

    def step(*arrays):
        tensors = [Tensor(a, requires_grad=True) for a in arrays]
        y = function(*tensors)
        found = {}
        (y * y).sum().backward(deliver=lambda leaf, gradient: found.update({id(leaf): gradient}))
        return [y.data, *(found[id(t)] for t in tensors)]

    return step


def traced(step, arrays):
    trace = Trace(arrays, [])
    with trace.running() as results:
        results.extend(step(*arrays))
    return trace


def planned(step, arrays, meanwhile=None):
    first, second = traced(step, arrays), traced(step, [a.copy() for a in arrays])
    assert first.difference(second) == ""
    return Plan(second, home=nowhere, final=nowhere, meanwhile=meanwhile)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("meanwhile", [None, lambda: None], ids=["in order", "as late as possible"])
@pytest.mark.parametrize("case", [c for c in CASES if c.op != "dropout"], ids=str)
def test_every_op_replays_its_bits_on_other_inputs(case, meanwhile, dtype):
    step = step_of(case.call)
    args = [np.asarray(a, dtype) for a in case.args]
    plan = planned(step, args, meanwhile)
    for scale in (0.75, 1.0):  # a power of a positive number stays one
        others = [np.asarray(a * scale, dtype) for a in args]
        for got, expected in zip(plan.run(others), step(*others), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)


def test_traces_of_different_calls_differ():
    x = np.arange(6.0).reshape(2, 3)
    once, twice = traced(step_of(lambda t: t.sum()), [x]), traced(step_of(lambda t: (t * 2).sum()), [x])
    assert "calls" in once.difference(twice)
    sums, means = traced(step_of(lambda t: t.sum()), [x]), traced(step_of(lambda t: t.mean()), [x])
    assert sums.difference(means)


def test_constants_that_differ_between_steps_are_named():
    x = np.arange(3.0)
    for a, b in ((2.0, 3.0), (np.arange(3.0), np.ones(3))):
        trace, other = (traced(step_of(lambda t, c=c: (t * c).sum()), [x]) for c in (a, b))
        assert "outside of ops" in trace.difference(other)


@pytest.mark.parametrize(
    "look",
    [bool, float, int, lambda t: t.item(), lambda t: t.numpy(), lambda t: np.asarray(t), lambda t: t.argmax()],
)
def test_a_step_in_which_python_looks_at_a_value_is_refused(look):
    def function(t):
        look(t.sum())
        return t * 2

    trace = traced(step_of(function), [np.ones(3)])
    assert "Python looked at a value" in trace.difference(traced(step_of(function), [np.ones(3)]))


def test_decisions_by_comparison_are_replayed_not_remembered():
    step = step_of(lambda t: ops.where(t > 0, t, t * 3))
    plan = planned(step, [np.array([1.0, -1, 2])])
    other = np.array([-1.0, 1, -2])
    np.testing.assert_array_equal(plan.run([other])[0], step(other)[0])


def test_tracing_keeps_no_array_that_the_step_itself_lets_go():
    born = []

    def function(t):
        inner = t * 2
        born.append(weakref.ref(inner.data))
        return ops.sum(inner * 1.0)

    trace = Trace([np.ones(1000)], [])
    with trace.running() as results, no_grad():
        results.append(function(Tensor(np.ones(1000))).data)
        assert born[0]() is None


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20), st.integers(0, 20)), max_size=20))
def test_blocks_in_use_at_the_same_time_do_not_overlap(spans):
    blocks = [Block(size=64 * n, first=min(a, b), last=max(a, b)) for n, a, b in spans]
    size = _place(blocks)
    at_once = [sum(b.size for b in blocks if b.first <= t <= b.last) for t in range(21)]
    assert max(at_once, default=0) <= size <= sum(b.size for b in blocks)
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            apart_in_time = a.last < b.first or b.last < a.first
            assert apart_in_time or a.offset + a.size <= b.offset or b.offset + b.size <= a.offset


def test_arrays_that_do_not_live_together_share_memory():
    def function(t):
        for _ in range(20):
            t = ops.tanh(t) @ np.eye(50)
        return t

    plan = planned(step_of(function), [np.ones((50, 50))])
    # forward needs each tanh until backward; everything else is short-lived
    assert 20 * 50 * 50 * 8 <= plan.arena_bytes < plan.computed_bytes / 2


@pytest.mark.parametrize("view", [lambda t: t.reshape(6, 2), lambda t: t.transpose()], ids=["reshape", "transpose"])
def test_a_gradient_that_is_a_reshaped_array_is_computed_in_its_place(view):
    weight = Tensor(np.arange(12.0).reshape(4, 3), requires_grad=True, name="weight")
    home = np.zeros((4, 3))

    def deliver(leaf, gradient):
        if leaf is weight:
            tracing.get().deliver(leaf, gradient)

    def step(x):
        held = view(weight)
        (Tensor(x) @ held.reshape(6, 2)).sum().backward(deliver=deliver)
        return []

    traces = []
    for _ in range(2):
        given = np.ones((5, 6))
        traces.append(Trace([given], [weight]))
        with traces[-1].running() as results:
            results.extend(step(given))
    finals = []
    plan = Plan(traces[1], home=lambda parameter: home, final=finals.append)
    x = np.random.default_rng(0).standard_normal((5, 6))
    plan.run([x])
    assert finals == [weight]
    np.testing.assert_allclose(home, _gradient(weight, view, x), rtol=1e-12)
    in_place = any(row.where == "gradient" for row in plan.rows())
    assert in_place == (view(weight).shape == (6, 2))


def _gradient(weight, view, x):
    weight.grad = None
    (Tensor(x) @ view(weight).reshape(6, 2)).sum().backward()
    return weight.grad


@pytest.mark.parametrize("waits", [False, True])
def test_where_sums_travel_a_gradient_is_there_before_what_only_later_ones_need(waits):
    weights = [Tensor(np.full((6, 6), 0.1 * i), requires_grad=True, name=f"w{i}") for i in range(3)]
    homes = {w: np.zeros((6, 6)) for w in weights}
    events = []

    def deliver(leaf, gradient):
        tracing.get().deliver(leaf, gradient)

    def step(x):
        y = Tensor(x)
        for weight in weights:
            y = ops.tanh(y @ weight)
        ops.sum(y).backward(deliver=deliver)
        return [y.data]

    traces = []
    x = np.random.default_rng(0).standard_normal((4, 6))
    for _ in range(2):
        traces.append(Trace([x], weights))
        with traces[-1].running() as results:
            results.extend(step(x))
    meanwhile = (lambda: events.append("")) if waits else None
    plan = Plan(traces[1], home=homes.get, final=lambda w: events.append(w.name), meanwhile=meanwhile)
    plan.run([x])
    assert [name for name in events if name] == ["w2", "w1", "w0"]
    assert (events[1] == "") is waits  # called after the first gradient, not before
    products = [row.output if row.name == "_matmul" else row.name for row in plan.rows()]
    for name in ("w2", "w1"):
        delivered = products.index(f"gradient of {name}")
        assert (
            products[delivered - 1] == "(6, 6)" if waits else products[delivered - 3 : delivered].count("(4, 6)") == 1
        )
    y = Tensor(x)
    for weight in weights:
        y = ops.tanh(y @ weight)
    ops.sum(y).backward()
    for weight in weights:
        np.testing.assert_array_equal(homes[weight], weight.grad)


def test_what_changes_in_place_or_waits_for_others_keeps_its_place():
    @op
    def count_up(x):
        x += 1
        return x

    count_up.is_in_place = True

    def call(name, *args, output):
        made = {"add": ops.add, "count up": count_up, "deliver": None}[name]
        return TracedCall(op=made, args=args, attributes={}, output=output)

    a, b = call("add", 0, 1, output=2), call("add", 0, 0, output=3)
    barrier, late = call("count up", 0, output=0), call("add", 2, 3, output=4)
    assert _late([a, b, barrier, late]) == [a, b, barrier, late]
    assert _late([a, b, late, barrier]) == [b, a, late, barrier]
    delivery = call("deliver", 3, output=3)
    assert _late([a, b, delivery, late]) == [b, delivery, a, late]
    unused = call("add", 0, 1, output=5)
    assert _late([unused, b, delivery]) == [unused, b, delivery]


def test_rows_count_one_operation_an_element_unless_the_op_knows_better():
    @op
    def expensive(x):
        return x + 1

    @expensive.vjp
    def _(g, _y, _x):
        return (g,)

    expensive.flops = lambda made, x, **_: 100 * x.size + made.size
    plan = planned(step_of(lambda t: expensive(t).reshape(6) * 2), [np.ones((2, 3))])
    flops = {row.name: row.flops for row in plan.rows()}
    assert flops["expensive"] == 606
    assert flops["multiply"] == 6
    assert flops["reshape"] == 0


def test_the_calls_of_a_plan_can_be_timed():
    plan = planned(step_of(lambda t: ops.exp(t).reshape(6) * 2), [np.ones((2, 3))])
    plan.run([np.zeros((2, 3))])
    times = plan.times_s(3)
    assert len(times) == len(list(plan.rows()))
    assert all(0 <= seconds < 1 for seconds in times)
    assert next(s for s, row in zip(times, plan.rows(), strict=True) if row.name == "exp") > 0
