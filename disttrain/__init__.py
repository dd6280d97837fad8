"""disttrain: data-parallel training with the same result on any number of workers.

::

    import disttrain as dt

    model = dt.Sequential([dt.layers.Dense(128, activation="relu", input_shape=(784,)),
                           dt.layers.Dense(10, activation="softmax")])
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x_train, y_train, epochs=10, batch_size=128)

runs in one process as ``python train.py``, and unchanged among four as ``disttrain run -n 4 train.py`` or
``mpirun -n 4 python train.py``.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Not imported at once: the launcher needs `disttrain.errors` only, and a script may set variables that NumPy
    # reads when it is imported.
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    api = importlib.import_module(f"{__name__}.api")
    if name == "__all__":
        return api.__all__
    if name not in api.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *importlib.import_module("disttrain.api").__all__]
