"""What a model computes becomes static: eager until two runs of one shape made the same calls, a plan from then on."""

from collections.abc import Callable, Sequence
from typing import Any

from disttrain.autodiff import Tensor, no_grad, ops
from disttrain.autodiff.plan import Plan
from disttrain.autodiff.trace import Trace
from disttrain.backend import Array
from disttrain.data import Batch
from disttrain.data_parallel import GradientSum
from disttrain.errors import ConfigError
from disttrain.kernels.precision import get_matmul_precision
from disttrain.layers import Layer
from disttrain.losses import Loss
from disttrain.observe import log

_MOST_DIFFERENCES = 3  # between a run and the next of its shape; a first one may fill a cache
_MOST_SHAPES = 8  # of batches; with more, each is too rare for a plan to pay


class Replay:
    """Plans of a computation, by the shapes of what it is given.

    Args:
        what: it is, for messages.
        model: whose weights it uses; they keep their memory.
        static: ``"auto"``: as a plan where that is possible; True: it must be; False: never.
        home: gives the place of a parameter's gradient, if there are any.
        final: called when it is there.
        meanwhile: as of `Plan`.

    Attributes:
        plans: by key.
    """

    def __init__(
        self,
        what: str,
        model: Layer,
        static: bool | str,
        *,
        home: Callable[[Any], Array] = lambda parameter: None,
        final: Callable[[Any], None] = lambda parameter: None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        self.what = what
        self.model = model
        self.static = static
        self.plans: dict[Any, Plan] = {}
        self._home = home
        self._final = final
        self._meanwhile = meanwhile
        self._traces: dict[Any, Trace] = {}
        self._to_check: set[Any] = set()
        self._differences = 0
        self._stays_eager = static is False

    def plan(self, key: Any) -> Plan | None:
        """Return the plan for `key`, if there is one to rely on."""
        return None if key in self._to_check else self.plans.get(key)

    def run(self, key: Any, inputs: Sequence[Array], eager: Callable[[], Sequence[Array]]) -> Sequence[Array]:
        """Return the results of `eager`, after learning what it does."""
        if self._stays_eager or (key not in self._traces and len(self._traces) == _MOST_SHAPES):
            return eager()
        trace = Trace(inputs, self.model.weights)
        with trace.running() as results:
            results.extend(eager())
        self._compare(key, trace)
        return results

    def check_again(self) -> None:
        """Run the next of each shape eagerly, and see whether the plan still is what it does.

        Somebody may have changed a layer, and a plan knows what it was.
        """
        self._to_check = set(self.plans)

    def _compare(self, key: Any, trace: Trace) -> None:
        """Make a plan of a trace if it is as the one before it of the same shape."""
        earlier, self._traces[key] = self._traces.get(key), trace
        self._to_check.discard(key)
        if earlier is None:
            return
        reason = earlier.difference(trace)
        if not reason:
            if key not in self.plans:
                self.plans[key] = Plan(trace, home=self._home, final=self._final, meanwhile=self._meanwhile)
            return
        self.plans.pop(key, None)
        self._differences += 1
        if self.static is True:
            raise ConfigError(f"{self.what} is not static: {reason}; compile(static='auto') runs it eagerly")
        if trace.refusal or self._differences == _MOST_DIFFERENCES:
            self._stays_eager = True
            log.warning("%s is not static, and runs eagerly: %s", self.what, reason)


class StaticStep:
    """What is computed for a batch, with gradients and without: by plans where there are some.

    Args:
        model: built.
        loss: of a sample.
        gradients: where gradients go.
        static: as of `Replay`.
    """

    def __init__(self, model: Layer, loss: Loss, gradients: GradientSum, static: bool | str) -> None:
        self.model = model
        self.loss = loss
        self.gradients = gradients
        self.training = Replay(
            "the step",
            model,
            static,
            home=gradients.home,
            final=gradients.final,
            meanwhile=gradients.meanwhile,
        )
        self.evaluation = Replay("the evaluation", model, static)

    def train(self, batch: Batch) -> Sequence[Array]:
        """Return the outputs and each sample's loss, arrays, with the gradients of their sum in their places."""
        inputs = [batch.x, batch.y]
        plan = self.plan(batch)
        if plan is None:
            return self.training.run(_key(batch), inputs, lambda: self._train(batch))
        self.gradients.begin()
        outputs = plan.run(inputs)
        self.gradients.finish()
        return outputs

    def plan(self, batch: Batch) -> Plan | None:
        """Return the plan of a step on such a batch, if there is one to rely on."""
        return self.training.plan(_key(batch))

    def evaluate(self, batch: Batch) -> Sequence[Array]:
        """Return the outputs and each sample's loss, arrays that the next batch may write over."""
        inputs = [batch.x, batch.y]
        key = _shapes(inputs)
        plan = self.evaluation.plan(key)
        return plan.run(inputs) if plan else self.evaluation.run(key, inputs, lambda: self._evaluate(batch))

    def _train(self, batch: Batch) -> tuple[Array, Array]:
        y_pred, per_sample = self._forward(batch)
        self.gradients.backward(ops.sum(per_sample) / batch.global_size)
        return y_pred.data, per_sample.data

    def _evaluate(self, batch: Batch) -> tuple[Array, Array]:
        # recorded, and dropped: the loss looks behind the last activation, as in training
        y_pred, per_sample = self._forward(batch)
        return y_pred.data, per_sample.data

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.y is not None
        y_pred = self.model(batch.x)
        return y_pred, self.loss.per_sample(Tensor(batch.y), y_pred)


class StaticPrediction:
    """A model's outputs, without gradients: by a plan where there is one."""

    def __init__(self, model: Layer, static: bool | str) -> None:
        self.model = model
        self.replay = Replay("the prediction", model, static)

    def run(self, x: Array) -> Array:
        """Return the outputs for `x`, an array that the next run may write over."""
        key = _shapes([x])
        plan = self.replay.plan(key)
        return plan.run([x])[0] if plan else self.replay.run(key, [x], lambda: [self._eager(x)])[0]

    def _eager(self, x: Array) -> Array:
        with no_grad():
            return self.model(x, training=False).data


def _key(batch: Batch) -> tuple[Any, ...]:
    """Return what the plan of a step must be for."""
    return (*_shapes([batch.x, batch.y]), batch.global_size)


def _shapes(arrays: Sequence[Array]) -> tuple[Any, ...]:
    """Return what a plan for `arrays` must be for: their shapes and dtypes, and the precision of products."""
    return (*((a.shape, a.dtype) for a in arrays), get_matmul_precision())
