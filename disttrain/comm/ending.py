"""What ends all ranks when one of them fails."""

import sys
from types import TracebackType

from disttrain.comm.base import Communicator


def abort_on_exception(comm: Communicator) -> None:
    """End all ranks after the traceback of an exception that nothing has caught: the others would wait for this one."""
    print_traceback = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        print_traceback(kind, error, traceback)
        sys.stdout.flush()
        sys.stderr.flush()
        comm.abort(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook
