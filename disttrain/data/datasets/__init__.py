"""Known data sets, one file each, loaded when asked for: ``datasets.digits.load_data()``.

A file in this folder is a data set, and its name is the registration. It has `load_data()`, which
returns ``(x_train, y_train), (x_test, y_test)`` as in Keras; `LICENSE`; and `PACKAGE`, the package
that carries its files, or None where the files are part of disttrain.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """Return the names of all known data sets, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name: str) -> ModuleType:
    known = names()
    if name in known:
        return importlib.import_module(f"{__name__}.{name}")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module {__name__!r} has no data set {name!r}{hint} Known: {', '.join(known)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *names()})
