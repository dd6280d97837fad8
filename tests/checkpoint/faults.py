"""The operations on files that a checkpoint is made of: recorded, left out, or made to fail."""

import os

from disttrain.checkpoint import disk

KINDS = ("mkdir", "create", "write", "sync", "rename", "unlink", "rmdir")


class Crash(BaseException):
    """The process ends here: nothing that comes after is done."""


class Faults:
    """Records operations on files; lets the `fails_at`-th, counted from 1, fail or end the process, or leaves it out.

    Args:
        monkeypatch: of the test.
        fails_at: which operation; None: none.
        error: what it raises; after a Crash no operation does anything. None: it is left out, silently.
        torn: whether half of it is done before, where it is a write; else whether it is done before it fails.
        syncs: whether flushing really happens: it takes most of the time.
    """

    def __init__(self, monkeypatch, fails_at=None, error=None, *, torn=False, syncs=True):
        self.done = []  # kind, and what it was done to
        self.fails_at, self.error, self.torn, self.syncs = fails_at, error, torn, syncs
        self.is_dead = False
        self.paths = {}
        for kind in KINDS:
            monkeypatch.setattr(disk, kind, self.watched(kind, getattr(disk, kind)))
        monkeypatch.setattr(os, "close", self.closing(os.close))

    @property
    def kinds(self):
        return [kind for kind, *_ in self.done]

    def watched(self, kind, function):
        def watching(first, *rest):
            if self.is_dead:
                raise Crash  # the clearing-up does not happen either
            self.done.append(self.described(kind, first, *rest))
            if len(self.done) != self.fails_at:
                return self.call(kind, function, first, *rest)
            if self.error is None:
                return None
            if self.torn and kind == "write":
                function(first, bytes(rest[0])[: len(rest[0]) // 2])
            elif self.torn:
                self.call(kind, function, first, *rest)
            self.is_dead = isinstance(self.error, Crash)
            raise self.error

        return watching

    def call(self, kind, function, first, *rest):
        if kind == "sync" and not self.syncs:
            return None
        result = function(first, *rest)
        if kind == "create":
            self.paths[result] = str(first)
        return result

    def described(self, kind, first, *rest):
        if kind == "write":
            return kind, self.paths[first], bytes(rest[0])
        if kind == "sync":
            return kind, self.paths.get(first) or os.readlink(f"/proc/self/fd/{first}")
        return kind, str(first), *map(str, rest)

    def closing(self, close):
        def closing(descriptor):
            self.paths.pop(descriptor, None)
            close(descriptor)

        return closing
