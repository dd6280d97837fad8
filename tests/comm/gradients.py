"""Gradients across ranks against finite differences: of the sum of all ranks' losses, in every rank's argument."""

import numpy as np

from disttrain import grad, ops
from disttrain.autodiff import Tensor
from disttrain.comm import functional
from tests.comm.claims import holds

# As `check_grads` has it: central differences err by about 1e-11 of the value, which is of the order of 10 here.
STEP, TOLERANCE = 1e-5, 1e-6


def check(comm, function, *shapes, order=2):
    """Compare the gradients of `function`, from Tensors to a Tensor, with differences of the sum over ranks."""
    generator = np.random.default_rng(comm.rank)
    points = [generator.uniform(0.5, 1.5, shape) for shape in shapes]
    _check(comm, function, points, order, generator)


def _check(comm, function, points, order, generator):
    weights = generator.standard_normal(function(*map(Tensor, points)).shape)  # of its own on every rank

    def loss(*xs):
        return ops.sum(function(*xs) * weights)

    def everyones_loss():
        return float(comm.all_reduce(np.array(loss(*map(Tensor, points)).data)))

    gradient = grad(loss, tuple(range(len(points))))
    worst = 0.0
    for number, got in enumerate(gradient(*points)):
        worst = max(worst, np.abs(got - _differences(comm, everyones_loss, points[number])).max(initial=0))
    holds(comm, worst <= TOLERANCE)
    for number in range(len(points)) if order > 1 else ():
        _check(comm, lambda *xs, number=number: gradient(*xs)[number], points, order - 1, generator)


def _differences(comm, everyones_loss, mine):
    """Return the gradient in `mine`; all ranks move the elements of all ranks, one after the other."""
    found = np.zeros_like(mine)
    for owner, shape in enumerate(comm.all_gather_json(mine.shape)):
        for at in np.ndindex(*shape):
            ends = []
            for step in (STEP, -STEP):
                before = mine[at] if owner == comm.rank else None
                if owner == comm.rank:
                    mine[at] += step
                ends.append(everyones_loss())
                if owner == comm.rank:
                    mine[at] = before
            if owner == comm.rank:
                found[at] = (ends[0] - ends[1]) / (2 * STEP)
    return found


def collective(name, *args):
    """Return a function with the collective `name` in its midst, not linear in what goes in or comes out."""

    def function(comm):
        return lambda x: ops.tanh(getattr(functional, name)(x * x, *args, comm=comm))

    return function


def last_root(comm):
    return collective("broadcast", comm.world_size - 1)(comm)


def around(comm):
    """Return a function that passes its argument around, and back."""
    after, before = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size

    def function(x):
        there = functional.send_recv(x * x, after, before, comm=comm)
        return x * functional.send_recv(ops.exp(there), before, after, comm=comm)

    return function


def along(comm):
    """Return a function that passes its argument from the first rank to the last, each doing its part: a pipeline."""

    def function(x):
        value = x * x
        if comm.rank > 0:
            value = value * functional.recv(x, comm.rank - 1, tag=3, comm=comm)
        value = ops.tanh(value)
        if comm.rank < comm.world_size - 1:
            value = value + functional.send(value, comm.rank + 1, tag=3, comm=comm)
        return value

    return function


def one_way(comm):
    """Return a function in which the last rank gets what is linear in the sum of both, and the others send."""

    def function(x):
        if comm.rank < comm.world_size - 1:
            return functional.send(ops.tanh(x), comm.world_size - 1, comm=comm) + ops.sum(x)
        return x + sum((functional.recv(x, rank, comm=comm) for rank in range(comm.rank)), Tensor(np.zeros(x.shape)))

    return function


EVERYWHERE = {
    "sum": (collective("all_reduce"), (2, 3)),
    "mean": (collective("all_reduce", "mean"), ()),
    "gather": (collective("all_gather"), (2,)),
    "gather of numbers": (collective("all_gather"), ()),
    "scatter": (collective("reduce_scatter"), (4, 2)),
    "scatter of few": (collective("reduce_scatter", "mean"), (3,)),
    "broadcast": (collective("broadcast"), (3,)),
    "broadcast from the last": (last_root, (2, 1)),
    "around": (around, (2, 2)),
    "along": (along, (2,)),
    "one way": (one_way, (3,)),
}
