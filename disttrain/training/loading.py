"""`load_model`: a Sequential made again from its checkpoint. Nothing that a file names is imported or run."""

import os
from collections.abc import Mapping
from typing import Any

from disttrain import comm, layers, losses, metrics, optimizers
from disttrain.checkpoint import Checkpoint
from disttrain.data_parallel import DataParallel
from disttrain.data_parallel import compression as compressions
from disttrain.errors import CheckpointError
from disttrain.training.model import Model
from disttrain.training.saving import read, understood
from disttrain.training.sequential import Sequential


def load_model(path: str | os.PathLike[str], custom_objects: Mapping[str, Any] | None = None) -> Model:
    """Return the Sequential that `Model.save` wrote to `path`, compiled as it was, with its optimizer's state.

    Args:
        path: what was given to `save`, or one of the checkpoints in it.
        custom_objects: classes of your own that the model is made of, by their names.

    Raises:
        CheckpointError: there is none, it is damaged, or the model cannot be made from it; says why.
    """
    saved = read(comm.current(), path)
    assert saved is not None
    return understood(saved, lambda: _made(saved, dict(custom_objects or {})))


def _made(saved: Checkpoint, custom_objects: dict[str, Any]) -> Model:
    known = {**_classes(layers), **_classes(optimizers), **custom_objects, "Sequential": Sequential}
    described = saved.values.get("model") if isinstance(saved.values, dict) else None
    if not isinstance(described, dict):
        raise CheckpointError(f"{saved.place} does not hold a model that Model.save wrote")
    if described["class"] != "Sequential":
        raise CheckpointError(
            f"{saved.place} holds a {described['class']}, a model written in Python: make one and call its load()"
        )
    model = _make(described, known, saved)
    if described["input_shape"] and model.input_shape is None:
        model.input_shape = tuple(described["input_shape"])
        model._build_if_known()
    compiled = described["compiled"]
    parts = (compiled["optimizer"], compiled["loss"], *compiled["metrics"]) if compiled else ()
    if compiled and not any("not_saved" in part for part in parts):
        model.compile(
            _make(compiled["optimizer"], known, saved),
            _make(compiled["loss"], {**_classes(losses), **custom_objects}, saved),
            [_make(m, {**_classes(metrics), **custom_objects}, saved) for m in compiled["metrics"]],
            distribution=_distribution(compiled.get("distribution"), saved),
        )
    model.load(saved.place)
    return model  # type: ignore[no-any-return]


def _distribution(described: dict[str, Any] | None, saved: Checkpoint) -> DataParallel | None:
    """Return how ranks shared the work; None where a checkpoint does not say, or a compression is not of disttrain."""
    if described is None or "not_saved" in described:
        return None
    known = {**_classes(compressions), "DataParallel": DataParallel}
    chosen = described["config"]["compression"]
    if chosen is not None and chosen["class"] not in known:
        return None
    compression = None if chosen is None else _make(chosen, known, saved)
    config = {**described["config"], "compression": compression}
    return _make({**described, "config": config}, known, saved)  # type: ignore[no-any-return]


def _make(described: dict[str, Any], known: Mapping[str, Any], saved: Checkpoint) -> Any:
    """Return an object of one of the `known` classes from its description."""
    name = described["class"]
    if name not in known:
        raise CheckpointError(
            f"{saved.place} needs the class {name!r}: load_model(path, custom_objects={{{name!r}: ...}})"
        )
    if "not_saved" in described:
        raise CheckpointError(
            f"{saved.place} does not hold the arguments of {name}, because {described['not_saved']}; "
            "make the model in Python and call its load()"
        )
    config = {key: _made_of(value, known, saved) for key, value in described["config"].items()}
    try:
        return known[name](**config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{saved.place}: a {name} cannot be made of the arguments that it holds: {error}; "
            "make the model in Python and call its load()"
        ) from error


def _made_of(value: Any, known: Mapping[str, Any], saved: Checkpoint) -> Any:
    """Return an argument: what is described by class and arguments as an object, else as it is."""
    if isinstance(value, list):
        return [_made_of(item, known, saved) for item in value]
    if isinstance(value, dict) and value.keys() == {"class", "config"}:
        return _make(value, known, saved)
    return value


def _classes(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, type)}
