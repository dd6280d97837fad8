"""The relay: what ranks write reaches one terminal or file, each line with its rank before it.

A progress bar is a line that is never finished, only redrawn: unfinished lines are passed on after a
moment, and stay whole when another rank writes meanwhile.
"""

import os
import re

HOLD_S = 0.05  # long enough for the rest of a line that was written in pieces, too short to be noticed

_ERASE = b"\r\x1b[2K"
_RESTORE = b"\x1b[?25h\x1b[0m"
# What terminals are told without showing anything: move, erase, hide the cursor; colours (m) do show.
_CONTROL = rb"\x1b\[[0-9;?]*[A-Za-ln-z]"
# Places where a line begins: after a newline, and after the carriage return of a line to be redrawn.
_BEGINNING = re.compile(rb"(\n(?:\r|%b)*+)(?=[^\r])|(\r(?:\r|%b)*+)(?=[^\r\n])" % (_CONTROL, _CONTROL))
_IS_AT_BEGINNING = re.compile(rb"(?:\A|\r)(?:%b)*\Z" % _CONTROL)


class Sink:
    """A place where output goes, and the unfinished line that stands there."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._is_terminal = os.isatty(fd)
        self._owner: object = None
        self._line = b""

    def write(self, owner: object, label: bytes, data: bytes) -> None:
        """Write `data`, each of its lines after `label`; another owner's unfinished line stays apart."""
        is_mine = self._owner is owner
        other = b"" if is_mine else self._line
        before = self._line if is_mine else b""
        if other:
            self._put(_ERASE if self._is_terminal else b"\n")
        text = labelled(data, label, is_at_beginning=bool(_IS_AT_BEGINNING.search(before)))
        rest = (before + text).rpartition(b"\n")[2]
        if other and not rest and self._is_terminal:
            self._put(text + other)  # the other's line stands again, below
            return
        self._put(text)
        # Of a line that was redrawn only the last drawing counts.
        self._owner, self._line = owner, re.split(rb"\r(?=[^\r])", rest)[-1]

    def finish(self) -> None:
        """End an unfinished line, so that what follows stands by itself."""
        if self._line:
            self._put(b"\n")
        self._owner, self._line = None, b""

    def restore(self) -> None:
        """Give a terminal its cursor and its colour back: who was killed in a progress bar did not."""
        if self._is_terminal:
            self._put(_RESTORE)

    def _put(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]


class Stream:
    """What one rank writes to one of its two outputs.

    Args:
        sink: where it goes.
        label: what stands before each line.
    """

    def __init__(self, sink: Sink, label: bytes) -> None:
        self._sink = sink
        self._label = label
        self._tail = b""
        self._since_s = 0.0

    def feed(self, data: bytes, now_s: float) -> None:
        """Pass on the whole lines of what was written so far, and keep the rest for a moment."""
        lines, newline, tail = (self._tail + data).rpartition(b"\n")
        if newline or not self._tail:
            self._since_s = now_s
        self._tail = tail
        if newline:
            self._sink.write(self, self._label, lines + newline)

    def flush(self, now_s: float) -> None:
        """Pass on an unfinished line that has waited long enough."""
        if self._tail and now_s - self._since_s >= HOLD_S:
            tail, self._tail = self._tail, b""
            self._sink.write(self, self._label, tail)

    @property
    def is_waiting(self) -> bool:
        """Whether there is an unfinished line to pass on."""
        return bool(self._tail)


def labelled(data: bytes, label: bytes, *, is_at_beginning: bool) -> bytes:
    """Return `data` with `label` where a line begins, after what only moves the cursor or erases.

    Args:
        data: any bytes; a line may begin or end anywhere in it.
        label: what to insert.
        is_at_beginning: whether a line begins with the first byte.
    """
    if not label:
        return data
    start = b"\n" if is_at_beginning else b""
    marked = _BEGINNING.sub(lambda found: found[0] + label, start + data)
    return marked[len(start) :]
