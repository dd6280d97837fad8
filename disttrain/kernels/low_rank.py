"""A sum of few outer products in one pass: cpu/low_rank.cpp."""

from disttrain.backend import Array
from disttrain.kernels.library import address, applies_to, native


def product(p: Array, q: Array, out: Array) -> bool:
    """Write ``p q`` to `out`; return False, with nothing changed, where no kernel applies.

    Args:
        p: shape ``(rows, rank)``.
        q: shape ``(rank, columns)``.
        out: shape ``(rows, columns)``.
    """
    compute = native("low_rank")
    if compute is None or not applies_to(p, q, out):
        return False
    compute(*out.shape, len(q), address(p), address(q), address(out))
    return True


def rest(m: Array, p: Array, q: Array, out: Array) -> bool:
    """Write ``m - p q`` to `out`, of the shape of `m`; else as `product`."""
    compute = native("low_rank_rest")
    if compute is None or not applies_to(m, p, q, out):
        return False
    compute(*out.shape, len(q), address(p), address(q), address(m), address(out))
    return True
