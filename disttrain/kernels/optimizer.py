"""Optimizers' rules on flat arrays, changed in place in one pass: cpu/optimizer.cpp."""

from disttrain.backend import Array
from disttrain.kernels.library import address, applies_to, native


def sgd(parameter: Array, gradient: Array, *, rate: float) -> bool:
    """Take a step of plain SGD; return False, with nothing changed, where no kernel applies."""
    return _changed("sgd", (parameter, gradient), rate)


def momentum(
    parameter: Array, gradient: Array, velocity: Array, *, rate: float, momentum: float, nesterov: bool
) -> bool:
    """Take a step of SGD with momentum; return False, with nothing changed, where no kernel applies."""
    return _changed("nesterov" if nesterov else "momentum", (parameter, gradient, velocity), rate, momentum)


def adam(
    parameter: Array,
    gradient: Array,
    mean: Array,
    square: Array,
    *,
    rate: float,
    keep: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
) -> bool:
    """Take a step of Adam; return False, with nothing changed, where no kernel applies.

    Args:
        parameter: changed.
        gradient: of the same size, as the others.
        mean: of gradients; changed.
        square: mean of the gradients' squares; changed.
        rate: the learning rate with the corrections of both means.
        keep: what is left of the parameter before the step: 1 without weight decay.
        beta_1: decay of `mean`.
        beta_2: decay of `square`.
        epsilon: added to the root.
    """
    return _changed("adam", (parameter, gradient, mean, square), rate, keep, 1 - beta_1, 1 - beta_2, epsilon)


def _changed(name: str, arrays: tuple[Array, ...], *numbers: float) -> bool:
    compute = native(name)
    if compute is None or not applies_to(*arrays):
        return False
    parameter, _, *slots = arrays
    if not all(a.flags.writeable for a in (parameter, *slots)) or any(a.size != parameter.size for a in arrays):
        return False  # the definition says what is wrong
    compute(parameter.size, *map(address, arrays), *numbers)
    return True
