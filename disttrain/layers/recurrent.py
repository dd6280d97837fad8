"""What the recurrent layers have in common."""

from collections.abc import Callable
from typing import Any

import numpy as np

from disttrain.autodiff import Tensor, ops
from disttrain.autodiff.op import array_of
from disttrain.autodiff.ops import elementwise
from disttrain.backend import Array
from disttrain.errors import ConfigError, ShapeError
from disttrain.initializers import Initializer
from disttrain.layers.activation import Function, get_activation
from disttrain.layers.dropout import Dropout
from disttrain.layers.layer import Layer


class Recurrent(Layer):
    """Base of the layers that go through a sequence. Shape: ``(samples, steps, n) -> (samples, units)``.

    A subclass says how many columns a unit has in the kernels (`gates`) and how many arrays its state is (`states`);
    `_whole` computes the outputs of all steps from nothing on, where there is such an op, and `_steps` in a loop.

    Args:
        units: length of an output.
        activation: of what is new in a step; a name or a function.
        use_bias: whether biases are added.
        kernel_initializer: of ``kernel``, for the input.
        recurrent_initializer: of ``recurrent_kernel``, for the output of the step before.
        bias_initializer: of ``bias``.
        dropout: share of the elements of an input that are 0 while training, the same in all steps.
        recurrent_dropout: the same of the output of the step before, where ``recurrent_kernel`` is multiplied with it.
        return_sequences: whether the outputs of all steps are returned, ``(samples, steps, units)``, not of the last.
        return_state: whether a tuple is returned: the output, and the state after the last step, ``(samples, units)``
            each: the output, and LSTM's memory.
        go_backwards: whether the last step comes first; outputs are in the order in which they are computed.
        stateful: refused; see `call` for the state that a sequence begins with.
        zero_output_for_mask: whether the output of a step that is left out is 0, not that of the step before.
        **kwargs: of every `Layer`.

    Source, of dropout: Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", 2016.
    """

    ndim = 3
    fixed_last_axis = True
    gates: int
    states = 1
    _whole: Callable[..., Any] | None = None
    _steps: Callable[..., tuple[Any, ...]]

    def __init__(
        self,
        units: int,
        activation: str | Function | None = "tanh",
        *,
        use_bias: bool = True,
        kernel_initializer: str | Initializer = "glorot_uniform",
        recurrent_initializer: str | Initializer = "orthogonal",
        bias_initializer: str | Initializer = "zeros",
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        zero_output_for_mask: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(units, int | np.integer) or units < 1:
            raise ConfigError(f"{type(self).__name__}: units must be an integer of at least 1, not {units!r}")
        if stateful:
            raise ConfigError(
                f"{type(self).__name__}: stateful=True is not offered: a sample of the next batch may be on another "
                "rank; return_state=True returns the state, and layer(x, initial_state=...) begins with it"
            )
        self.units = units
        self.activation = activation
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        self.recurrent_initializer = recurrent_initializer
        self.bias_initializer = bias_initializer
        self.dropout = dropout
        self.recurrent_dropout = recurrent_dropout
        self.return_sequences = return_sequences
        self.return_state = return_state
        self.go_backwards = go_backwards
        self.stateful = stateful
        self.zero_output_for_mask = zero_output_for_mask
        self._functions = {"activation": get_activation(activation)}
        self._of_input = Dropout(dropout, name="dropout", dtype=self.dtype)
        self._of_output = Dropout(recurrent_dropout, name="recurrent_dropout", dtype=self.dtype)

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create kernels and bias."""
        width = self.gates * self.units
        self.kernel = self.add_weight("kernel", (input_shape[-1], width), self.kernel_initializer)
        self.recurrent_kernel = self.add_weight("recurrent_kernel", (self.units, width), self.recurrent_initializer)
        shape = self._bias_shape()
        self.bias = self.add_weight("bias", shape, self._begin_bias()) if self.use_bias else np.zeros(shape, self.dtype)

    def call(self, x: Any, initial_state: Any = None, mask: Any = None, training: bool = False) -> Any:
        """Return the outputs.

        Args:
            x: sequences.
            initial_state: what they begin with: an array or Tensor ``(samples, units)``, or a list of them, for LSTM
                of the output and the memory; by default 0.
            mask: which steps count, bool or 0 and 1, ``(samples, steps)``. Where it is 0 the state stays as it is, and
                the output is that of the step before, 0 at first. By default that of `x`.
            training: whether elements are dropped.
        """
        if x.shape[1] == 0:
            raise ShapeError(
                f"layer {self.path!r} ({type(self).__name__}): expected a step at least, received {x.shape}"
            )
        samples = x.shape[0]
        how: dict[str, Any] = {}
        if initial_state is not None:
            how["begin"] = self._states_of(initial_state, samples)
        if mask is not None:
            mask = self._mask_of(mask, x)
            how["mask"] = ops.flip(mask, axis=1) if self.go_backwards else mask
            how["zeros"] = self.zero_output_for_mask
        if self.go_backwards:
            x = ops.flip(x, axis=1)
        if training and self.dropout:
            x = x * self._of_input.mask(x[:, :1])
        if training and self.recurrent_dropout:
            # of something that samples have: what is the same for all of them has no place in the batch
            kept = self._of_output.mask(ops.broadcast_to(x[:, 0, :1], shape=(samples, self.units)))
            how["drop"] = lambda h: h * kept
        y, *states = self._through(x, how)
        y = y if self.return_sequences else y[:, -1]
        return (y, *states) if self.return_state else y

    def compute_mask(self, x: Any, mask: Any = None) -> Any:
        """Return the mask of the input if there is an output for each of its steps."""
        if not self.return_sequences or mask is None:
            return None
        mask = self._mask_of(mask, x)
        return ops.flip(mask, axis=1) if self.go_backwards else mask

    def _through(self, x: Any, how: dict[str, Any]) -> tuple[Any, ...]:
        """Return the outputs of all steps, and the states after the last."""
        args = x, self.kernel, self.recurrent_kernel, self.bias
        whole = type(self)._whole
        if whole is None or how or (self.return_state and self.states > 1):
            return type(self)._steps(*args, **self._functions, **how)
        y = whole(*args, **self._functions)
        return y, y[:, -1]

    def _bias_shape(self) -> tuple[int, ...]:
        return (self.gates * self.units,)

    def _begin_bias(self) -> str | Initializer:
        return self.bias_initializer

    def _states_of(self, given: Any, samples: int) -> list[Any]:
        """Return the states to begin with as Tensors of the layer's dtype, or say what is wrong with them."""
        given = list(given) if isinstance(given, list | tuple) else [given]
        shapes = [np.shape(array_of(each)) for each in given]
        if shapes != [(samples, self.units)] * self.states:
            raise ShapeError(
                f"layer {self.path!r} ({type(self).__name__}): expected initial_state as {self.states} of shape "
                f"({samples}, {self.units}), received {shapes}"
            )
        tensors = [each if isinstance(each, Tensor) else Tensor(_array(each)) for each in given]
        return [each if each.dtype == self.dtype else ops.cast(each, dtype=self.dtype) for each in tensors]

    def _mask_of(self, mask: Any, x: Any) -> Any:
        """Return a mask as bool, or say what is wrong with it."""
        mask = mask if isinstance(mask, Tensor) else _array(mask)
        if mask.shape != x.shape[:2] or mask.dtype.kind not in "biu":
            raise ShapeError(
                f"layer {self.path!r} ({type(self).__name__}): expected a mask of bool or integers of shape "
                f"{x.shape[:2]}, received {mask.dtype} {mask.shape}"
            )
        return mask if mask.dtype == bool else elementwise.not_equal(mask, 0)


class Gated(Recurrent):
    """Base of LSTM and GRU.

    Args:
        units: as of every recurrent layer.
        activation: the same.
        recurrent_activation: of gates; a name or a function.
        **kwargs: as of every recurrent layer.
    """

    def __init__(
        self,
        units: int,
        activation: str | Function | None = "tanh",
        recurrent_activation: str | Function | None = "sigmoid",
        **kwargs: Any,
    ) -> None:
        super().__init__(units, activation, **kwargs)
        self.recurrent_activation = recurrent_activation
        self._functions["recurrent_activation"] = get_activation(recurrent_activation)


def _array(value: Any) -> Array:
    return value if hasattr(value, "dtype") else np.asarray(value)
