"""Tensor: an array of NumPy or CuPy that remembers the call which made it."""

from collections.abc import Iterator
from typing import Any

from disttrain.autodiff import ops
from disttrain.autodiff.backward import Deliver, backward
from disttrain.autodiff.op import Recorded, array_of, tracing
from disttrain.autodiff.ops import elementwise
from disttrain.backend import Array, floatx, get_array_module, to_host
from disttrain.errors import AutodiffError


class Tensor(Recorded):
    """An array with its history.

    Args:
        data: an array (kept as it is, not copied), or anything that NumPy makes one of; Python floats
            become `floatx()`.
        requires_grad: whether `backward` computes its gradient.
        name: how messages call it.

    Attributes:
        data: the array.
        grad: the gradient as an array, summed up by `backward` until it is set to None.
    """

    __slots__ = ()
    __array_ufunc__ = None  # so that `array + tensor` comes to Tensor.__radd__

    def __init__(self, data: Array, *, requires_grad: bool = False, name: str = "") -> None:
        data = array_of(data)
        if not hasattr(data, "dtype"):
            data = get_array_module(data).asarray(data)
            if data.dtype.kind == "f":
                data = data.astype(floatx())
        if requires_grad and data.dtype.kind != "f":
            raise AutodiffError(f"only floating-point Tensors have gradients, not {data.dtype}")
        super().__init__(data, requires_grad=requires_grad, name=name)

    def backward(self, gradient: Array = None, *, deliver: Deliver | None = None, retain_graph: bool = False) -> None:
        """Compute the gradient of this Tensor in every leaf behind it and add it to the leaf's `grad`.

        Args:
            gradient: the cotangent of this Tensor; may be left out for a scalar.
            deliver: instead of adding to `grad`, called with each leaf and its final gradient, an array.
            retain_graph: keep the graph for another backward.

        Raises:
            AutodiffError: nothing was recorded, this is not a scalar, or the graph was freed.
        """
        backward(self, gradient, deliver=deliver or _add_to_grad, retain_graph=retain_graph)

    def detach(self) -> "Tensor":
        """Return a Tensor of the same array without history."""
        return Tensor(self.data)

    def numpy(self) -> Array:
        """Return the values as a NumPy array; not a copy where they already are one."""
        _note_read("numpy()")
        return to_host(self.data)

    def item(self) -> Any:
        """Return the value of a Tensor of one element as a Python number."""
        _note_read("item()")
        return self.data.item()

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.data.shape  # type: ignore[no-any-return]

    @property
    def dtype(self) -> Any:  # noqa: D102
        return self.data.dtype

    @property
    def ndim(self) -> int:  # noqa: D102
        return self.data.ndim  # type: ignore[no-any-return]

    @property
    def size(self) -> int:  # noqa: D102
        return self.data.size  # type: ignore[no-any-return]

    @property
    def T(self) -> Any:  # noqa: D102, N802
        return ops.transpose(self)

    def astype(self, dtype: Any) -> Any:
        """Return this Tensor as `dtype`."""
        return ops.cast(self, dtype=dtype)

    def reshape(self, *shape: Any) -> Any:
        """Return this Tensor in another shape: ``t.reshape(2, -1)`` or ``t.reshape((2, -1))``."""
        return ops.reshape(self, shape=_unpacked(shape))

    def transpose(self, *axes: Any) -> Any:
        """Return this Tensor with its axes in the order `axes`, numbers or one tuple; reversed without."""
        return ops.transpose(self, axes=_unpacked(axes) or None)

    def sum(self, axis: Any = None, *, keepdims: bool = False) -> Any:
        """Return the sum over `axis`."""
        return ops.sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Any = None, *, keepdims: bool = False) -> Any:
        """Return the mean over `axis`."""
        return ops.mean(self, axis=axis, keepdims=keepdims)

    def max(self, axis: Any = None, *, keepdims: bool = False) -> Any:
        """Return the maximum over `axis`."""
        return ops.max(self, axis=axis, keepdims=keepdims)

    def argmax(self, axis: Any = None) -> Any:
        """Return where the maximum is, as an array of integers: it has no gradient."""
        _note_read("argmax()")
        return self.data.argmax(axis)

    def __add__(self, other: Any) -> Any:
        return ops.add(self, other)

    def __radd__(self, other: Any) -> Any:
        return ops.add(other, self)

    def __sub__(self, other: Any) -> Any:
        return ops.subtract(self, other)

    def __rsub__(self, other: Any) -> Any:
        return ops.subtract(other, self)

    def __mul__(self, other: Any) -> Any:
        return ops.multiply(self, other)

    def __rmul__(self, other: Any) -> Any:
        return ops.multiply(other, self)

    def __truediv__(self, other: Any) -> Any:
        return ops.divide(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return ops.divide(other, self)

    def __pow__(self, other: Any) -> Any:
        return ops.power(self, other)

    def __rpow__(self, other: Any) -> Any:
        return ops.power(other, self)

    def __matmul__(self, other: Any) -> Any:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return ops.matmul(other, self)

    def __neg__(self) -> Any:
        return ops.negative(self)

    def __abs__(self) -> Any:
        return ops.abs(self)

    def __getitem__(self, index: Any) -> Any:
        return ops.getitem(self, index=index)

    # comparisons give arrays of bool, which have no gradient; Tensors hash by identity
    def __eq__(self, other: object) -> Any:
        return False if other is None else array_of(elementwise.equal(self, other))

    def __ne__(self, other: object) -> Any:
        return True if other is None else array_of(elementwise.not_equal(self, other))

    def __lt__(self, other: Any) -> Any:
        return array_of(elementwise.less(self, other))

    def __le__(self, other: Any) -> Any:
        return array_of(elementwise.less_equal(self, other))

    def __gt__(self, other: Any) -> Any:
        return array_of(elementwise.greater(self, other))

    def __ge__(self, other: Any) -> Any:
        return array_of(elementwise.greater_equal(self, other))

    __hash__ = object.__hash__

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        _note_read("bool()")
        return bool(self.data)

    def __float__(self) -> float:
        _note_read("float()")
        return float(self.data)

    def __int__(self) -> int:
        _note_read("int()")
        return int(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        _note_read("numpy.asarray()")
        if copy is None:
            return to_host(self.data).astype(dtype or self.dtype, copy=False)
        return to_host(self.data).astype(dtype or self.dtype, copy=copy)

    def __repr__(self) -> str:
        extra = f", name={self.name!r}" if self.name else ""
        extra += ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({to_host(self.data)}, dtype={self.dtype}{extra})"


def _unpacked(numbers: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the numbers that were given one by one, or together as one tuple or list."""
    return tuple(numbers[0]) if len(numbers) == 1 and isinstance(numbers[0], tuple | list) else numbers


def _add_to_grad(leaf: Any, gradient: Array) -> None:
    if leaf.grad is None:
        leaf.grad = get_array_module(gradient).array(gradient)  # a copy: `gradient` may be shared
    else:
        leaf.grad += gradient


def _note_read(how: str) -> None:
    """Tell a trace that Python looks at a value, and may decide by it."""
    trace = tracing.get()
    if trace is not None:
        trace.refuse(f"Python looked at a value, by {how}")
