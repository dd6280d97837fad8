"""Batch normalization over the global batch: the statistics of all ranks' samples together."""

from typing import Any

from disttrain.autodiff import no_grad, ops
from disttrain.autodiff.ops.normalization import move_average
from disttrain.layers.layer import Layer
from disttrain.layers.step import current_step


class BatchNormalization(Layer):
    """Normalizes each channel to mean `beta` and standard deviation `gamma`. Shape: as the input.

    While training the statistics are the batch's, and moving averages of them are kept for inference. Unlike
    in most frameworks they are by default those of the global batch, summed over the ranks, so that N workers
    train the same model as one.

    Args:
        momentum: of the moving averages.
        epsilon: added to the variance.
        center: whether `beta` is added.
        scale: whether `gamma` multiplies.
        synchronized: False: each rank normalizes by the statistics of its own samples, which saves two small
            all-reduces; the result then depends on the number of workers, and rank 0's moving averages are
            the model's. In a reproducible `fit`, each shard of the batch has statistics of its own, on any number of
            workers.
        **kwargs: of every `Layer`.

    Source: Ioffe & Szegedy, "Batch normalization", 2015.
    """

    min_ndim = 2
    fixed_last_axis = True

    def __init__(
        self,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        *,
        center: bool = True,
        scale: bool = True,
        synchronized: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.momentum = momentum
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        self.synchronized = synchronized

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create gamma, beta and the moving averages."""
        shape = input_shape[-1:]
        self.gamma = self.add_weight("gamma", shape, "ones") if self.scale else None
        self.beta = self.add_weight("beta", shape, "zeros") if self.center else None
        self.moving_mean = self.add_weight("moving_mean", shape, "zeros", trainable=False)
        self.moving_variance = self.add_weight("moving_variance", shape, "ones", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        """Return the normalized input; frozen, or held by a frozen layer, it behaves as in inference."""
        gamma = 1.0 if self.gamma is None else self.gamma
        beta = 0.0 if self.beta is None else self.beta
        # without a sample of its own there are no statistics of its own
        if not (training and current_step().trainable and (self.synchronized or x.shape[0])):
            return ops.batch_norm(x, self.moving_mean, self.moving_variance, gamma, beta, epsilon=self.epsilon)
        total = current_step().total if self.synchronized else lambda part: part
        y, mean, variance = ops.batch_norm_of_batch(x, gamma, beta, epsilon=self.epsilon, total=total)
        if current_step().keeps:
            with no_grad():
                move_average(self.moving_mean, mean, momentum=self.momentum)
                move_average(self.moving_variance, variance, momentum=self.momentum)
        return y
