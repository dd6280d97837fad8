"""How exactly float32 matrices are multiplied: PyTorch's names and meaning."""

from disttrain import env
from disttrain.errors import unknown_name

PRECISIONS = ("highest", "high", "medium")  # numbered as in cpu/matmul.h

_chosen = ""


def set_matmul_precision(precision: str) -> None:
    """Choose how exactly float32 matrices are multiplied in this process, from the next product on.

    A plan of a model is prepared again; results differ between settings only where the CPU has matrix units (AMX).
    Elsewhere all of them compute in float32: more exactly than asked for.

    Args:
        precision: ``"highest"``: as in float32. ``"high"``: of each number 16 bits count, the sum of two bfloat16.
            ``"medium"``: of each number 8 bits count, as in bfloat16. Sums are float32 always. By default what
            ``DISTTRAIN_MATMUL_PRECISION`` says, else ``"highest"``.

    Raises:
        ConfigError: there is no such precision.
    """
    global _chosen
    _chosen = _known(precision)


def get_matmul_precision() -> str:
    """Return how exactly float32 matrices are multiplied: see `set_matmul_precision`.

    Raises:
        ConfigError: ``DISTTRAIN_MATMUL_PRECISION`` names none.
    """
    return _chosen or _known(env.matmul_precision() or PRECISIONS[0])


def _known(precision: str) -> str:
    if precision not in PRECISIONS:
        raise unknown_name("matmul precision", precision, PRECISIONS)
    return precision
