"""Layer: weights and a function of them. Layers hold layers; a path names each, and its weights."""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np

from disttrain import initializers
from disttrain.autodiff import Tensor, ops
from disttrain.backend import floatx, random_generator, seed
from disttrain.errors import ConfigError, ShapeError, readable
from disttrain.layers.mask import mask_of, put_mask, warn_that_it_ends
from disttrain.layers.step import current_step, training_mode

watching: ContextVar[Callable[["Layer", Any], None] | None] = ContextVar("watching", default=None)  # is told of outputs

_numbers: Counter[str] = Counter()  # for layers that belong to no model


class Layer:
    """Base of all layers.

    A layer of your own defines `call`, and `build` if it has weights::

        class Scale(Layer):
            def build(self, input_shape):
                self.factor = self.add_weight("factor", input_shape[-1:], "ones")

            def call(self, x):
                return x * self.factor

    Every argument of a constructor is kept under its own name: that is how a model is saved.

    Args:
        name: the layer's name within its model; by default from its class.
        dtype: of weights and inputs, ``"float32"`` unless `set_floatx` said otherwise.
        trainable: whether its weights are trained.
        input_shape: shape of a sample; given to the first layer, a model is built at once.
    """

    ndim: int | None = None  # axes of an input, the samples' included
    min_ndim = 1
    fixed_last_axis = False  # whether inputs must keep the last length that the layer was built for
    autocast = True  # whether inputs are cast to the layer's dtype
    supports_masking = False  # whether what it does with a step of a sequence concerns that step alone

    def __init__(
        self,
        *,
        name: str | None = None,
        dtype: str | None = None,
        trainable: bool = True,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.dtype = dtype or floatx()
        self.trainable = trainable
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.output_shape: tuple[int | None, ...] | None = None
        self._path: str | None = None
        self._built_for: tuple[int, ...] | None = None
        self._own_weights: dict[str, tuple[Tensor, bool]] = {}  # with whether training changes it

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create the weights for inputs of `input_shape`, the number of samples included."""

    def call(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output for `x`; may take ``training``, a bool, and ``mask``, that of `x`."""
        raise NotImplementedError(f"{type(self).__name__} must define call(self, x)")

    def __call__(self, x: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """Return the output for `x`, building the layer at the first call.

        Args:
            x: an array or Tensor, shape ``(samples, ...)``.
            args: further inputs that the layer's `call` takes.
            training: whether layers behave as in training; by default as the step that runs.
            kwargs: further arguments of the layer's `call`.

        Raises:
            ShapeError: names the layer, the shape it expects and the shape it received.
        """
        mask = kwargs.get("mask")
        if mask is None and (mask := mask_of(x)) is not None and self._takes("mask"):
            kwargs["mask"] = mask
        with training_mode(training, trainable=self.trainable):
            x = self._received(x)
            if self._built_for is None:
                self._set_path(self.path)
                self._build_for(x, *args, **kwargs)
                self._set_path(self.path)  # of layers that build made
                self._built_for = x.shape
            extra = {"training": current_step().training} if self._takes("training") else {}
            y = self.call(x, *args, **kwargs, **extra)
        first = y[0] if isinstance(y, tuple) else y
        if (made := self.compute_mask(x, mask)) is not None:
            put_mask(first, made)
        self.output_shape = (None, *first.shape[1:])
        if (told := watching.get()) is not None:
            told(self, first)
        return y

    def compute_mask(self, x: Any, mask: Any = None) -> Any:
        """Return which steps of the output for `x` count; None: all.

        The next layer whose `call` takes ``mask`` is given it.

        Args:
            x: the input.
            mask: of the input, shape ``(samples, steps)``.
        """
        if mask is not None and not self.supports_masking and not self._takes("mask"):
            warn_that_it_ends(self)
        return mask if self.supports_masking else None

    def add_weight(
        self,
        name: str,
        shape: Sequence[int],
        initializer: str | initializers.Initializer = "glorot_uniform",
        *,
        trainable: bool = True,
    ) -> Tensor:
        """Return a new weight, whose initial value depends on the seed and the layer's path only.

        Args:
            name: within the layer.
            shape: of the weight.
            initializer: its name, or a function from a generator and a shape to an array.
            trainable: False for state that training keeps but does not differentiate.
        """
        path = _joined(self.path, name)
        generator = random_generator(seed(), "weight", path)
        value = initializers.get(initializer)(generator, tuple(shape)).astype(self.dtype, order="C")
        weight = Tensor(value, requires_grad=trainable, name=path)
        self._own_weights[name] = (weight, trainable)
        return weight

    @property
    def path(self) -> str:
        """The layer's name with those of the layers that hold it: ``"block/dense_1"``."""
        if self._path is None:
            self._path = self._path_alone()
        return self._path

    @property
    def weights(self) -> list[Tensor]:
        """All weights, each once, in the order of the layers."""
        return list(self._walk_weights(trainable=True))

    @property
    def trainable_weights(self) -> list[Tensor]:
        """The weights that training changes by their gradients."""
        return [w for w, trains in self._walk_weights(trainable=True).items() if trains]

    @property
    def non_trainable_weights(self) -> list[Tensor]:
        """Frozen weights, and state such as moving averages."""
        return [w for w, trains in self._walk_weights(trainable=True).items() if not trains]

    def sublayers(self) -> list[tuple[str, "Layer"]]:
        """Return the layers that this one holds, with names: its attributes, and lists and dicts of layers."""
        return [
            (layer.name or key, layer)
            for attribute, value in vars(self).items()
            for key, layer in _layers_in(attribute, value)
        ]

    def count_params(self) -> int:
        """Return the number of weights' elements."""
        return sum(w.size for w in self.weights)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {
            name: getattr(self, name)
            for cls in type(self).__mro__
            if cls is not object
            for name, parameter in inspect.signature(vars(cls).get("__init__", cls)).parameters.items()
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }

    @classmethod
    @functools.cache
    def _takes(cls, argument: str) -> bool:
        return argument in inspect.signature(cls.call).parameters

    def _walk_weights(self, *, trainable: bool) -> dict[Tensor, bool]:
        """Return all weights with whether each is trained: a frozen layer freezes those it holds."""
        trainable = trainable and self.trainable
        found = {weight: trainable and trains for weight, trains in self._own_weights.values()}
        for _, layer in self.sublayers():
            for weight, trains in layer._walk_weights(trainable=trainable).items():
                found.setdefault(weight, trains)
        return found

    def _build_for(self, x: Any, *args: Any, **kwargs: Any) -> None:
        """Build for what a call was given; a layer whose weights depend on further inputs looks at them here."""
        self.build(x.shape)

    def _received(self, x: Any) -> Any:
        """Return the input as a Tensor of the layer's dtype, or say what is wrong with its shape."""
        if not isinstance(x, Tensor):
            x = Tensor(x if hasattr(x, "dtype") else np.asarray(x))
        last = self._built_for[-1] if self.fixed_last_axis and self._built_for else None
        wrong = (
            x.ndim < self.min_ndim
            or (self.ndim is not None and x.ndim != self.ndim)
            or (last is not None and x.shape[-1] != last)
        )
        if wrong:
            raise ShapeError(
                f"layer {self.path!r} ({type(self).__name__}): expected an input of shape "
                f"{self._expected_shape(last)}, received {readable(x.shape)}"
            )
        if self.autocast and x.dtype != self.dtype:
            return ops.cast(x, dtype=self.dtype)
        return x

    def _expected_shape(self, last: int | None) -> str:
        end = "channels" if last is None else str(last)
        if self.ndim == 4:
            return f"(samples, height, width, {end})"
        if self.ndim == 3:
            return f"(samples, steps, {end})"
        return f"(samples, {end})" if self.ndim == 2 else f"(samples, ..., {end})"

    def _path_alone(self) -> str:
        """Return the path of a layer that belongs to no model."""
        return self.name or _numbered(type(self), _numbers)

    def _set_path(self, path: str) -> None:
        """Give this layer, the layers it holds, and all their weights the names that follow from `path`."""
        self._path = path
        for name, (weight, _) in self._own_weights.items():
            weight.name = _joined(path, name)
        taken: dict[str, Layer] = {}
        for name, layer in self.sublayers():
            if taken.setdefault(name, layer) is not layer:
                raise ConfigError(f"two layers of {path or 'the model'!r} are called {name!r}; names must differ")
            layer._set_path(_joined(path, name))


_PLAIN = (str, int, float, Tensor, type(None))


def _layers_in(key: str, value: Any) -> Iterator[tuple[str, Layer]]:
    if isinstance(value, Layer):
        yield key, value
    elif isinstance(value, _PLAIN):  # most attributes; to know it of a Mapping takes ten times as long
        return
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _layers_in(f"{key}_{name}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _layers_in(f"{key}_{number}", item)


def numbered_names(layers: Sequence[Layer]) -> list[str]:
    """Return a name for each layer: its own, or its class's in snake case, numbered from the second on."""
    counts: Counter[str] = Counter()
    return [layer.name or _numbered(type(layer), counts) for layer in layers]


def _numbered(cls: type, counts: Counter[str]) -> str:
    base = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z0-9])(?=[A-Z][a-z])", "_", cls.__name__).lower()
    number = counts[base]
    counts[base] += 1
    return f"{base}_{number}" if number else base


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
