"""A training step that becomes static: eager until two of one shape made the same calls, a plan from then on."""

from typing import Any

from disttrain.autodiff import Tensor, ops
from disttrain.autodiff.plan import Plan
from disttrain.autodiff.trace import Trace
from disttrain.backend import Array
from disttrain.data import Batch
from disttrain.data_parallel import GradientSum
from disttrain.errors import ConfigError
from disttrain.layers import Layer
from disttrain.losses import Loss
from disttrain.observe import log

_MOST_DIFFERENCES = 3  # between a step and the next of its shape; a first one may fill a cache
_MOST_SHAPES = 8  # of batches; with more, each is too rare for a plan to pay


class StaticStep:
    """Forward, loss and backward of one batch: by a plan where there is one.

    Args:
        model: built.
        loss: of a sample.
        gradients: where gradients go.
        static: ``"auto"``: as a plan where that is possible; True: it must be; False: never.

    Attributes:
        plans: by the shapes and dtypes of the batch.
    """

    def __init__(self, model: Layer, loss: Loss, gradients: GradientSum, static: bool | str) -> None:
        self.model = model
        self.loss = loss
        self.gradients = gradients
        self.static = static
        self.plans: dict[Any, Plan] = {}
        self._traces: dict[Any, Trace] = {}
        self._to_check: set[Any] = set()
        self._differences = 0
        self._stays_eager = static is False

    def run(self, batch: Batch) -> tuple[Array, Array]:
        """Return the outputs and each sample's loss, arrays, with the gradients of their sum in their places."""
        assert batch.y is not None
        inputs = [batch.x, batch.y]
        key = (*((a.shape, a.dtype) for a in inputs), batch.global_size)
        plan = self.plans.get(key)
        if plan is not None and key not in self._to_check:
            self.gradients.begin()
            outputs = plan.run(inputs)
            self.gradients.finish()
            return outputs[0], outputs[1]
        if self._stays_eager or (key not in self._traces and len(self._traces) == _MOST_SHAPES):
            return self._eager(batch)
        trace = Trace(inputs, self.model.weights)
        with trace.running() as results:
            results.extend(self._eager(batch))
        self._compare(key, trace)
        return results[0], results[1]

    def check_again(self) -> None:
        """Take the next step of each shape eagerly, and see whether the plan still is what it does.

        A callback may have changed a layer, and a plan knows what it was.
        """
        self._to_check = set(self.plans)

    def _eager(self, batch: Batch) -> tuple[Array, Array]:
        y_pred = self.model(batch.x)
        per_sample = self.loss.per_sample(Tensor(batch.y), y_pred)
        self.gradients.backward(ops.sum(per_sample) / batch.global_size)
        return y_pred.data, per_sample.data

    def _compare(self, key: Any, trace: Trace) -> None:
        """Make a plan of a trace if it is as the one before it of the same shape."""
        earlier, self._traces[key] = self._traces.get(key), trace
        self._to_check.discard(key)
        if earlier is None:
            return
        reason = earlier.difference(trace)
        if not reason:
            if key not in self.plans:
                self.plans[key] = Plan(trace, home=self.gradients.home, final=self.gradients.final)
            return
        self.plans.pop(key, None)
        self._differences += 1
        if self.static is True:
            raise ConfigError(f"the step is not static: {reason}; compile(static='auto') runs it eagerly")
        if trace.refusal or self._differences == _MOST_DIFFERENCES:
            self._stays_eager = True
            log.warning("the step is not static, and runs eagerly: %s", reason)
