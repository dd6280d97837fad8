"""What `disttrain verify` asks of a script that it runs: the digests of all that the first steps compute, then the end.

Samples and the outputs of layers are compared sample by sample, whatever rank has which: the digest of an array is the
sum of its samples' hashes.
"""

import contextlib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from disttrain import env
from disttrain.autodiff import Tensor
from disttrain.autodiff.op import array_of
from disttrain.backend import Array, floatx, random_generator, to_host
from disttrain.comm import Communicator
from disttrain.data import Batch, shard
from disttrain.kernels.library import chosen
from disttrain.layers import Layer, current_step
from disttrain.layers.layer import watching

Train = TypeVar("Train", bound=Callable[..., Any])

_HELD = 1 << 64


def asked(comm: Communicator) -> "Witness | None":
    """Return the witness that `disttrain verify` asks for, None where it did not start this script."""
    task = env.verify()
    return None if task is None else Witness(comm, *task)


class Witness:
    """Notes what a model computes in its first steps, then ends the script; every rank makes one.

    Args:
        comm: the ranks.
        steps: how many to look at.
        folder: where rank 0 writes its notes, as ``NUMBER_OF_RANKS.json``.
    """

    def __init__(self, comm: Communicator, steps: int, folder: Path) -> None:
        self._comm = comm
        self._steps = steps
        self._path = folder / f"{comm.world_size}.json"
        self._notes: list[list[Any]] = []  # step, what it is, of what, its digest, its norm; in the order of causes
        self._taken = 0
        self._outputs: dict[str, int] = {}
        self._calls: Counter[tuple[str, int]] = Counter()

    @contextlib.contextmanager
    def step(self, model: Layer, shards: int | None, batch: Batch) -> Iterator[None]:
        """Note what happens inside a ``with`` block, a step; the block of the last one ends with SystemExit."""
        if self._taken == 0:
            self._facts = {
                "workers": self._comm.world_size,
                "transport": self._comm.transport,
                "shards": shards,
                "kernels": chosen().name,
                "floatx": floatx(),
                "unsynchronized": [each.path for each in _layers(model) if not getattr(each, "synchronized", True)],
            }
            self._note_weights("initial weights", model.weights)
        parts = [shard(batch.global_size, number, shards) for number in range(shards)] if shards else []
        self._samples = {part.start: part.stop - part.start for part in parts}
        for name, array in (("x", batch.x), ("y", batch.y)):
            if array is not None:
                self._outputs[name] = self._sum(array, batch.first, len(array))
        self._samples.setdefault(batch.first, len(batch.x))
        self._share("samples")
        token = watching.set(self._see)
        try:
            yield
        finally:
            watching.reset(token)
        self._share("output")
        gradients = [Tensor(w.grad, name=w.name) for w in model.trainable_weights if w.grad is not None]
        self._note_weights("gradient", gradients[::-1])  # as backward goes
        self._note_weights("weights", model.weights)
        self._taken += 1
        if self._comm.rank == 0:
            self._path.write_text(json.dumps({**self._facts, "steps": self._taken, "notes": self._notes}))
        if self._taken == self._steps:
            self._comm.barrier()
            raise SystemExit(0)

    def _see(self, layer: Layer, output: Any) -> None:
        """Add the samples of an output to those that other shards and ranks have."""
        first = current_step().first
        call = self._calls[layer.path, first] = self._calls[layer.path, first] + 1
        name = layer.path + (f" (call {call})" if call > 1 else "")
        total = self._outputs.get(name, 0) + self._sum(array_of(output), first, self._samples[first])
        self._outputs[name] = total % _HELD

    def _sum(self, array: Array, first: int, samples: int) -> int:
        """Return the sum of the hashes of samples, each with its place in the batch."""
        host = np.ascontiguousarray(to_host(array))
        if host.size == 0 or host.size % samples:
            return 0
        words = host.reshape(samples, -1).view(np.uint8)
        words = words.view(np.uint32) if words.shape[1] % 4 == 0 else words
        factors = random_generator("witness").integers(0, _HELD, words.shape[1], np.uint64) | np.uint64(1)
        places = np.arange(first + 1, first + 1 + samples, dtype=np.uint64)
        hashes = (words * factors).sum(axis=1, dtype=np.uint64) * (2 * places + 1)  # modulo 2**64
        return int(hashes.sum(dtype=np.uint64))

    def _share(self, kind: str) -> None:
        """Note the sums of all ranks."""
        everybody = self._comm.all_gather_json(self._outputs)
        for name in everybody[0]:
            total = sum(each.get(name, 0) for each in everybody) % _HELD
            self._notes.append([self._taken, kind, name, f"{total:016x}", None])
        self._outputs = {}
        self._calls.clear()

    def _note_weights(self, kind: str, weights: Sequence[Tensor]) -> None:
        for weight in weights:
            host = np.ascontiguousarray(to_host(weight.data))
            digest = hashlib.sha256(host.tobytes()).hexdigest()
            norm = float(np.linalg.norm(host.astype(np.float64).ravel()))
            self._notes.append([self._taken, kind, weight.name, digest, norm])


def witnessed(train: Train) -> Train:
    """Let a replica's witness, where it has one, see each step; a decorator."""

    @functools.wraps(train)
    def step(replica: Any, batch: Batch, *args: Any) -> Any:
        if replica.witness is None:
            return train(replica, batch, *args)
        with replica.witness.step(replica.model, replica.shards, batch):
            return train(replica, batch, *args)

    return cast(Train, step)


def _layers(layer: Layer) -> Iterator[Layer]:
    yield layer
    for _, held in layer.sublayers():
        yield from _layers(held)
