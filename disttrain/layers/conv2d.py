"""Conv2D, channels last."""

from collections.abc import Sequence
from typing import Any

from disttrain.autodiff import ops
from disttrain.autodiff.ops.conv import output_size
from disttrain.errors import ConfigError
from disttrain.initializers import Initializer
from disttrain.layers.activation import Function, get_activation
from disttrain.layers.layer import Layer
from disttrain.layers.window import check_fits, padding_for, pair


class Conv2D(Layer):
    """Slides `filters` kernels over images. Shape: ``(samples, h, w, c) -> (samples, oh, ow, filters)``.

    Args:
        filters: number of outputs per place.
        kernel_size: height and width of the window; one number for both.
        strides: steps of the window, down and across.
        padding: ``"valid"``, only whole windows; ``"same"``, ``oh = ceil(h / stride)``.
        activation: a name, a function, or None.
        use_bias: whether a bias is added.
        kernel_initializer: of the kernel, shape ``(kh, kw, c, filters)``.
        bias_initializer: of the bias, shape ``(filters,)``.
        **kwargs: of every `Layer`.
    """

    ndim = 4
    fixed_last_axis = True

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = (1, 1),
        padding: str = "valid",
        activation: str | Function | None = None,
        *,
        use_bias: bool = True,
        kernel_initializer: str | Initializer = "glorot_uniform",
        bias_initializer: str | Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if filters < 1:
            raise ConfigError(f"Conv2D: filters must be at least 1, not {filters}")
        self.filters = filters
        self.kernel_size = pair("Conv2D: kernel_size", kernel_size)
        self.strides = pair("Conv2D: strides", strides)
        self.padding = padding
        self.activation = activation
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer
        self._function = get_activation(activation)
        padding_for(padding, (1, 1), self.kernel_size, self.strides)  # an unknown name is an error here

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create kernel and bias."""
        shape = (*self.kernel_size, input_shape[-1], self.filters)
        self.kernel = self.add_weight("kernel", shape, self.kernel_initializer)
        self.bias = self.add_weight("bias", (self.filters,), self.bias_initializer) if self.use_bias else None

    def call(self, x: Any) -> Any:
        """Return the layer's output."""
        padding = padding_for(self.padding, x.shape[1:3], self.kernel_size, self.strides)
        check_fits(self, x.shape, output_size(x.shape[1:3], self.kernel_size, self.strides, padding))
        fused = "relu" if self._function is ops.relu else None
        y = ops.conv2d(x, self.kernel, self.bias, strides=self.strides, padding=padding, activation=fused)
        return y if fused else self._function(y)
