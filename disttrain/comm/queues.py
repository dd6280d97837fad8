"""Queues by key, of which none is kept empty: keys are routes and tags of messages, and groups come and go."""

from collections import deque
from typing import Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")


class Queues(Generic[K, T]):
    """Things in the order in which they came, for each key; ``len`` is the number of keys that have any."""

    def __init__(self) -> None:
        self._of: dict[K, deque[T]] = {}

    def put(self, key: K, thing: T) -> None:
        """Add `thing`, the last of its key."""
        self._of.setdefault(key, deque()).append(thing)

    def first(self, key: K) -> T | None:
        """Return the first of a key, None where there is none."""
        return self._of[key][0] if key in self._of else None

    def take(self, key: K) -> T | None:
        """Remove and return the first of a key, None where there is none."""
        if key not in self._of:
            return None
        thing = self._of[key].popleft()
        if not self._of[key]:
            del self._of[key]
        return thing

    def __len__(self) -> int:
        return len(self._of)
