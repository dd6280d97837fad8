"""Model: a layer that can be compiled, fitted, evaluated, asked, saved and loaded."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from disttrain import comm, losses, optimizers, progress
from disttrain.autodiff import no_grad
from disttrain.backend import seed, to_host
from disttrain.data import Batches, shard
from disttrain.data_parallel import DataParallel, FlatBuffer, flatten
from disttrain.errors import ConfigError, DataError
from disttrain.layers import Layer
from disttrain.metrics import Metric
from disttrain.metrics import get as get_metric
from disttrain.progress import Phase
from disttrain.training.agreement import Fact, describe, together
from disttrain.training.callbacks import Callback, History
from disttrain.training.drift import Guard
from disttrain.training.finite import check_policy
from disttrain.training.fit import Fit
from disttrain.training.progress import ProgressBar, show_values, shown
from disttrain.training.replica import Replica, copy_into
from disttrain.training.saving import read, write
from disttrain.training.static import StaticPrediction
from disttrain.training.summary import draw_plans, show_plans, summarize

_SHARDS = 8  # of a reproducible fit, where nothing else is said


class Model(Layer):
    """A model of your own: layers as attributes, and `call` that uses them.

    Under several ranks every method below is called by all of them, with the same arguments.

    Attributes:
        optimizer: that trains it; set by `compile`.
        stop_training: set to True by a callback to end training after the epoch.
    """

    autocast = False  # its layers do

    optimizer: optimizers.Optimizer
    current_fit: Fit

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stop_training = False
        self._loss: losses.Loss | None = None
        self._metrics: list[Metric] = []
        self._static: bool | str = "auto"
        self._guard = Guard()
        self._on_nonfinite = "raise"
        self._shards: int | None = None
        self._distribution = DataParallel()
        self._forget_replicas()

    def compile(
        self,
        optimizer: str | optimizers.Optimizer = "adam",
        loss: str | losses.Loss | Callable[[Any, Any], Any] | None = None,
        metrics: Sequence[str | Metric] | None = None,
        *,
        static: bool | str = "auto",
        distribution: DataParallel | None = None,
        check_replicas_every: int = 50,
        on_drift: str = "raise",
        on_nonfinite: str = "raise",
    ) -> None:
        """Say how to train: the optimizer, the loss, and the metrics to follow.

        Args:
            optimizer: a name, or an Optimizer.
            loss: a name, a Loss, or a function ``(y_true, y_pred) -> Tensor``.
            metrics: names or Metrics.
            static: ``"auto"``: a step that made the same calls twice is replayed as a plan; a model whose calls
                depend on values stays eager. True: that is an error. False: always eager.
            distribution: how ranks share the work and what they tell each other; None: ``DataParallel()``.
            check_replicas_every: after how many steps the ranks compare their trained weights, and at the end of
                `fit`; 0: never. It costs a pass over the weights' memory.
            on_drift: what is done where they differ. ``"raise"``: DriftError on all ranks, which names step, weight and
                rank. ``"heal"``: all take over weights and optimizer state of a rank of the majority; of two ranks,
                of rank 0. A part of that state that one rank alone has stays as it is.
            on_nonfinite: what is done where loss or gradients are NaN or infinite. No weight is changed by them.
                ``"raise"``: NonFiniteError on all ranks, which names step, rank, and the first layer, gradient or
                sample that is not finite. ``"skip"``: the step is left out, and a warning says the same; after
                16 in a row it is an error. With a `LossScaleOptimizer` gradients that are not finite lower the scale
                instead, while that can be lowered.

        Raises:
            ConfigError: an unknown name, with the nearest right one.
        """
        guard = Guard(every=check_replicas_every, policy=on_drift)
        check_policy(on_nonfinite)
        if loss is None:
            raise ConfigError("compile() needs a loss, as loss='sparse_categorical_crossentropy'")
        self.optimizer = optimizers.get(optimizer)
        self._loss = losses.get(loss)
        if isinstance(metrics, str):
            raise ConfigError(f"metrics is a list, as metrics=[{metrics!r}]")
        self._metrics = [get_metric(metric) for metric in metrics or ()]
        names = ["loss", *(metric.name for metric in self._metrics)]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two metrics are called {name!r} (the loss counts as one); give one a name=...")
        if static not in (True, False, "auto"):
            raise ConfigError(f"static is True, False or 'auto', not {static!r}")
        self._static = static
        if distribution is not None and not isinstance(distribution, DataParallel):
            raise ConfigError(f"distribution is a DataParallel, not {distribution!r}")
        self._distribution = distribution or DataParallel()
        self._guard = guard
        self._on_nonfinite = on_nonfinite
        self._forget_replicas()

    def fit(
        self,
        x: Any,
        y: Any,
        batch_size: int = 32,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Sequence[Callback] | None = None,
        validation_split: float = 0.0,
        validation_data: tuple[Any, Any] | None = None,
        *,
        shuffle: bool = True,
        initial_epoch: int = 0,
        reproducible: bool = False,
        shards: int | None = None,
    ) -> History:
        """Train on `x` and `y`, and return the course of loss and metrics.

        Args:
            x: inputs, shape ``(samples, ...)``; the same on all ranks, which take their parts of each batch.
            y: targets, one for each sample.
            batch_size: of the global batch: the result does not depend on how many ranks share it.
            epochs: number of the epoch to stop at.
            verbose: 0: silent; 1 or "auto": a progress bar on a terminal, else a line an epoch; 2: a line an
                epoch. Only rank 0 shows anything.
            callbacks: called between steps and epochs, in this order.
            validation_split: share of the samples, from the end, that are only evaluated on.
            validation_data: inputs and targets that are only evaluated on, after each epoch.
            shuffle: whether each epoch has another order.
            initial_epoch: number of the epoch to begin with.
            reproducible: whether the weights have the same bits on any number of workers: each batch is cut into
                `shards`, whose gradients and sums are added up in one order (docs/reproducibility.md). `evaluate` and
                `train_on_batch` then do so as well.
            shards: into how many, 8 if nothing is said; a number means `reproducible`.

        Raises:
            DataError: lengths that differ, labels outside the classes.
            ShapeError: names the layer, what it expected and what it received.
            NonFiniteError: loss or gradients became NaN or infinite; names step, rank, and what was first.
            CommError: the ranks were given different data or models.
        """
        ranks = comm.current()

        def prepare() -> tuple[Batches, Batches | None]:
            self._cut_into(_SHARDS if reproducible and shards is None else shards)
            training = self._batches(x, y, batch_size, shuffle=shuffle)
            held = validation_data
            if held is not None and len(held) != 2:
                raise ConfigError(f"validation_data is a pair, inputs and targets, not {len(held)} things")
            if validation_split:
                if validation_data is not None or not 0 < validation_split < 1:
                    raise ConfigError("validation_split is a share between 0 and 1, and excludes validation_data")
                at = int(len(training.x) * (1 - validation_split))
                held = training.x[at:], _part(training.y, slice(at, None))
                training = self._batches(training.x[:at], _part(training.y, slice(at)), batch_size, shuffle=shuffle)
            for name, number, least in (("epochs", epochs, 1), ("initial_epoch", initial_epoch, 0)):
                if not isinstance(number, int) or number < least:
                    raise ConfigError(f"{name} must be an integer of at least {least}, not {number!r}")
            return training, None if held is None else self._batches(held[0], held[1], batch_size, shuffle=False)

        def asked(made: tuple[Batches, Batches | None]) -> list[Fact]:
            training, validation = made
            held = [] if validation is None else [["validation_data", *part] for part in describe(validation)]
            value = [
                *describe(training),
                *held,
                ["epochs", epochs],
                ["initial_epoch", initial_epoch],
                ["shards", self._shards],
            ]
            return [Fact(what="what fit() was given", value=value)]

        batches, validation = together(ranks, prepare, asked)
        history = History()
        progress = ProgressBar(batches, epochs, verbose=verbose)
        self.current_fit = Fit(
            self,
            self._replica_among(ranks),
            batches,
            validation=validation,
            callbacks=[*(callbacks or ()), history, progress],
            epochs=epochs,
            initial_epoch=initial_epoch,
        )
        try:
            self.current_fit.run()
        finally:
            progress.on_train_end()  # else an interrupted bar keeps the terminal's cursor
        return history

    @progress.phase(Phase.FIT)
    def train_on_batch(self, x: Any, y: Any) -> dict[str, Any]:
        """Take one step on a global batch, of which each rank takes its part; return loss and metrics of it."""
        ranks = comm.current()
        batches = together(
            ranks,
            lambda: self._batches(x, y, len(x), shuffle=False),
            lambda made: [Fact(what="the batch", value=describe(made, compared=2))],  # once a step
        )
        replica = self._replica_among(ranks)
        return replica.logs(replica.train(batches.batch(0, 0)))

    def evaluate(
        self, x: Any, y: Any, batch_size: int = 32, verbose: str | int = 0, *, return_dict: bool = False
    ) -> Any:
        """Return loss and metrics over `x` and `y`, exact over all ranks.

        Args:
            x: as of `fit`.
            y: the same.
            batch_size: over all ranks.
            verbose: on rank 0, 0: nothing; 1 or "auto": a bar on a terminal, and a line of values; 2: the line.
            return_dict: whether to return a dict.

        Returns:
            The loss, or a list of loss and metrics where there are metrics; by name if `return_dict`.
        """
        ranks = comm.current()
        batches = together(
            ranks,
            lambda: self._batches(x, y, batch_size, shuffle=False),
            lambda made: [Fact(what="the data to evaluate on", value=describe(made))],
        )
        taken = shown(batches.epoch(0), "Evaluation", batches.steps_per_epoch, rank=ranks.rank, verbose=verbose)
        values = self._replica_among(ranks).evaluate(taken)
        show_values(values, "Evaluation", rank=ranks.rank, verbose=verbose)
        if return_dict:
            return values
        return list(values.values()) if self._metrics else values["loss"]

    @progress.phase(Phase.PREDICTION)
    def predict(self, x: Any, batch_size: int = 32, verbose: str | int = 0) -> Any:
        """Return the model's outputs for `x`, shape ``(samples, ...)``, on every rank; each computes a part.

        Args:
            x: samples.
            batch_size: of what a rank computes at once.
            verbose: on rank 0, 1 or "auto": a bar on a terminal; 0 or 2: nothing.
        """
        ranks = comm.current()
        batches = together(
            ranks,
            lambda: Batches(x, batch_size=batch_size, shuffle=False, seed=0),
            lambda made: [Fact(what="the data to predict for", value=describe(made))],
        )
        mine = shard(len(batches.x), ranks.rank, ranks.world_size)
        largest = -(-len(batches.x) // ranks.world_size)
        with no_grad():
            if self._built_for is None:
                self(batches.x[:0], training=False)
            if self._loss is not None:
                self._replica_among(ranks).share_state()
        self._prediction.replay.check_again()
        padded = None
        # a rank without samples computes none of them, for their shape
        starts = range(mine.start, mine.stop, batch_size) or [mine.stop]
        for start in shown(starts, "Prediction", len(starts), rank=ranks.rank, verbose=verbose):
            outputs = self._prediction.run(batches.x[start : min(start + batch_size, mine.stop)])
            if padded is None:
                padded = np.zeros((largest, *outputs.shape[1:]), outputs.dtype)
            padded[start - mine.start :][: len(outputs)] = to_host(outputs)
        gathered = ranks.all_gather(padded)
        parts = [shard(len(batches.x), rank, ranks.world_size) for rank in range(ranks.world_size)]
        return np.concatenate([g[: part.stop - part.start] for g, part in zip(gathered, parts, strict=True)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Add a checkpoint of weights, optimizer and architecture to the directory `path`; the newest two stay.

        Raises:
            CheckpointError: it could not be written; on all ranks.
            ConfigError: the model has no weights yet.
        """
        self._check_built("save()")
        write(comm.current(), path, *self.saved_parts())

    def saved_parts(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return what `save` writes: tensors by group and name, and values."""
        tensors: dict[str, dict[str, Any]] = {"model": {w.name: w.data for w in self.weights}}
        values: dict[str, Any] = {"model": self.description()}
        if self._loss is not None:
            replica = self._replica_among(comm.current())
            replica.share_state()
            tensors = replica.tensors()
            values.update(replica.progress())
        return tensors, values

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over weights, and the optimizer's state where it was saved, from the newest whole checkpoint.

        Raises:
            CheckpointError: there is none, or it is of another model; names the first weight that differs.
            ConfigError: the model has no weights yet.
        """
        self._check_built("load()")
        saved = read(comm.current(), path)
        assert saved is not None
        if self._loss is None or "optimizer" not in saved.tensors:
            copy_into({"model": {w.name: w.data for w in self.weights}}, saved.tensors)
        else:
            replica = self._replica_among(comm.current())
            replica.restore(saved.tensors, saved.values.get("training", saved.values))

    def summary(self) -> None:
        """Print the layers with their output shapes and numbers of weights; only rank 0 does."""
        if comm.current().rank == 0:
            summarize(self)

    def plan(self, to_file: str | os.PathLike[str] | None = None) -> None:
        """Print the plans of the training step: each call, its shapes, bytes, FLOPs, and where it writes; on rank 0.

        Args:
            to_file: draw how each plan uses its memory instead, to a file whose name ends with its format, as
                ``plan.svg``; needs matplotlib.

        Raises:
            ConfigError: there is nothing to draw, or nothing to draw with.
        """
        ranks = comm.current()
        if ranks.rank != 0:
            return
        replica = self._replicas.get(ranks)
        plans = {} if replica is None else replica.plans
        if to_file is None:
            show_plans(plans)
        else:
            draw_plans(plans, to_file)

    def description(self) -> dict[str, Any]:
        """Return what is needed to make and compile this model again, as JSON values."""
        compiled = None
        if self._loss is not None:
            compiled = {
                "optimizer": _described(self.optimizer),
                "loss": _described(self._loss),
                "metrics": [_described(metric) for metric in self._metrics],
                "distribution": _described(self._distribution),
            }
        return {**_described(self), "input_shape": self._built_for and self._built_for[1:], "compiled": compiled}

    def compute_mask(self, x: Any, mask: Any = None) -> Any:
        """Return None: its layers have said which steps of their outputs count."""

    def _path_alone(self) -> str:
        return ""  # the names of a model's weights do not begin with its own

    def _check_built(self, what: str) -> None:
        if self._built_for is None:
            raise ConfigError(
                f"{what}: the model has no weights yet; give its first layer input_shape, or call it once"
            )

    def _batches(self, x: Any, y: Any, batch_size: int, *, shuffle: bool) -> Batches:
        """Return this rank's view of `x` and `y`, after building the model for them and checking the targets."""
        if self._loss is None:
            raise ConfigError("the model is not compiled; call compile(optimizer, loss) first")
        ranks = comm.current()
        batches = Batches(
            x,
            y,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed(),
            rank=ranks.rank,
            world_size=ranks.world_size,
            shards=self._shards,
        )
        if batches.y is None:
            raise DataError("training and evaluation need targets: give y")
        if self._built_for is None or self._built_for[1:] != batches.x.shape[1:]:
            with no_grad():
                self(batches.x[:0], training=False)
        assert self.output_shape is not None
        self._loss.check(batches.y, self.output_shape)
        return batches

    def _cut_into(self, shards: int | None) -> None:
        """Compute batches in so many shards from now on; None: in as many as there are ranks."""
        if shards is not None and (not isinstance(shards, int) or isinstance(shards, bool) or shards < 1):
            raise ConfigError(f"shards must be an integer of at least 1, not {shards!r}")
        rounded = self._distribution.compression is not None or self._distribution.local_steps > 1
        if shards is not None and rounded:
            raise ConfigError(
                f"with {self._distribution} weights depend on the number of workers, with reproducible=True they do "
                "not: choose one"
            )
        if shards != self._shards:
            self._replicas.clear()
        self._shards = shards

    def _forget_replicas(self) -> None:
        self._prediction = StaticPrediction(self, self._static)
        self._buffers: list[FlatBuffer] | None = None
        self._replicas: WeakKeyDictionary[comm.Communicator, Replica] = WeakKeyDictionary()

    def replica_anew(self, ranks: comm.Communicator) -> Replica:
        """Return a new replica among `ranks`, which are others than they were; with the weights of rank 0."""
        self._replicas.pop(ranks, None)
        return self._replica_among(ranks)

    def _replica_among(self, ranks: comm.Communicator) -> Replica:
        """Return the replica among `ranks`; several share the buffers, as where one rank evaluates alone."""
        assert self._loss is not None
        if self._buffers is None:
            for weights, trains in ((self.trainable_weights, True), (self.non_trainable_weights, False)):
                for weight in weights:
                    weight.requires_grad = trains
            self._buffers = flatten(self.trainable_weights)
        if ranks not in self._replicas:
            self._replicas[ranks] = Replica(
                self,
                ranks,
                self._buffers,
                self.optimizer,
                self._loss,
                self._metrics,
                self._static,
                shards=self._shards,
                distribution=self._distribution,
                guard=self._guard,
                on_nonfinite=self._on_nonfinite,
            )
        return self._replicas[ranks]


def _described(thing: Any) -> dict[str, Any]:
    """Return class and arguments, or why they cannot be written down."""
    name = type(thing).__name__
    try:
        config = thing.get_config()
        json.dumps(config)
    except (TypeError, ValueError, AttributeError) as error:
        return {"class": name, "not_saved": str(error)}
    return {"class": name, "config": config}


def _part(array: Any, part: slice) -> Any:
    return None if array is None else array[part]
