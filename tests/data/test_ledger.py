"""A ledger says what was read; an audit finds out whether that is each sample once an epoch."""

import copy

import numpy as np
import pytest

from disttrain.data import Batches, Ledger, Order
from disttrain.data.ledger import audit, checksum, total
from disttrain.data.shard import mixed
from disttrain.errors import LedgerError

pytestmark = pytest.mark.timeout(60)

ORDER = Order(samples=47, batch_size=10, shuffle=True, seed=3)


def steps(order, begin, count):
    epoch, step = begin
    for _ in range(count):
        yield epoch, step
        epoch, step = (epoch + 1, 0) if step + 1 == order.steps else (epoch, step + 1)


def read(ledger, begin, count, world_size):
    """Take steps as ranks do, each adding what it reads; return what the next step would be."""
    order = ledger.order
    x = np.zeros((order.samples, 1))
    how = {"batch_size": order.batch_size, "shuffle": order.shuffle, "seed": order.seed, "world_size": world_size}
    ranks = [Batches(x, rank=rank, **how) for rank in range(world_size)]
    for epoch, step in steps(order, begin, count):
        parts = [each.batch(epoch, step).samples for each in ranks]
        sums = np.sum([[float(len(part)), float(checksum(part))] for part in parts], axis=0)
        ledger.note(epoch, step, int(sums[0]), total(sums[1]), world_size)
    return list(steps(order, begin, count + 1))[-1]


def resized(order=ORDER, key=b""):
    """Return the ledger of a run with interruptions, and where it stands."""
    ledger, place = Ledger(order, key), (0, 0)
    for count, world_size in ((3, 1), (4, 3), (1, 2), (9, 60), (5, 2)):
        place = read(ledger, place, count, world_size)
        again = Ledger(order, key)
        again.restore(ledger.state())
        ledger = again
    return ledger.state(), place


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("samples", "batch_size"), [(47, 10), (40, 10), (5, 10), (1, 1), (100_000, 30_000)])
def test_a_run_with_interruptions_is_in_order(samples, batch_size, shuffle):
    order = Order(samples=samples, batch_size=batch_size, shuffle=shuffle, seed=3)
    state, place = resized(order)
    account = audit(order, state, place)
    assert account.epochs == range(place[0])
    assert account.begun == place[1] * batch_size
    assert account.world_sizes == (1, 3, 2, 60, 2)


def test_parts_grow_as_long_as_nothing_interrupts_them():
    ledger = Ledger(ORDER)
    read(ledger, (0, 0), 23, 2)
    (part,) = ledger.state()
    assert (part["begin"], part["end"], part["world_size"]) == ((0, 0), (4, 3), 2)


def test_a_run_may_begin_with_a_later_epoch():
    ledger = Ledger(ORDER)
    place = read(ledger, (2, 0), 7, 2)
    assert audit(ORDER, ledger.state(), place).epochs == range(2, 3)


def edited(change):
    state, place = resized()
    state = copy.deepcopy(state)
    changed = change(state)
    return state if changed is None else changed, place


def set_at(number, name, value):
    return lambda state: state[number].update({name: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda state: state[1:],
            "begins with step 3 of epoch 0, and step 0 of epoch 0 was next: samples were left out",
        ),
        (lambda state: [state[0], *state], "samples were read twice"),
        (lambda state: state[:-1], "the run goes on with step 2 of epoch 4"),
        (lambda state: [*state[:2], *state[3:]], "samples were left out"),
        (set_at(1, "world_size", 2), "the chain of part 1 of the ledger, step 3 of epoch 0 up to step 2 of epoch 1"),
        (set_at(1, "begin", (0, 2)), "samples were read twice"),
        (set_at(0, "end", (0, 4)), "the chain of part 0"),
        (set_at(4, "end", (9, 7)), "is no such step"),
        (set_at(2, "end", (0, 0)), "is no such step"),
        (set_at(2, "chain", "0" * 64), "the chain of part 2"),
        (lambda state: [], "the ledger is empty"),
        (lambda state: "no list", "the ledger is not one"),
        (lambda state: [{"begin": 1}], "the ledger is not one"),
    ],
)
def test_a_changed_ledger_is_refused(change, text):
    state, place = edited(change)
    with pytest.raises(LedgerError, match=text):
        audit(ORDER, state, place)


@pytest.mark.parametrize("name", ["samples", "batch_size", "seed", "shuffle"])
def test_another_order_is_refused(name):
    state, place = resized()
    other = Order(**{**vars(ORDER), name: {"samples": 48, "batch_size": 9, "seed": 4, "shuffle": False}[name]})
    with pytest.raises(LedgerError):
        audit(other, state, place)


def test_what_was_read_counts_and_not_what_should_have_been():
    def spoiled(change):
        ledger = Ledger(ORDER)
        for epoch, step in steps(ORDER, (0, 0), 5):
            part = Batches(np.zeros((47, 1)), batch_size=10, shuffle=True, seed=3).batch(epoch, step).samples.copy()
            part = change(part) if step == 2 else part
            ledger.note(epoch, step, len(part), checksum(part), 1)
        return ledger.state()

    def twice(part):
        part[3] = part[4]
        return part

    assert audit(ORDER, spoiled(lambda part: part[::-1]), (1, 0)).epochs == range(1)  # a batch is a set
    for change in (twice, lambda part: part[1:], lambda part: np.append(part, part[0]), lambda part: (part + 1) % 47):
        with pytest.raises(LedgerError, match="the chain of part 0"):
            audit(ORDER, spoiled(change), (1, 0))


def test_who_lacks_the_key_cannot_make_a_ledger():
    state, place = resized(key=b"secret")
    assert audit(ORDER, state, place, b"secret").begun == 20
    forged, _ = resized()  # as anybody can
    for key, its in ((b"secret", forged), (b"", state), (b"another", state)):
        with pytest.raises(LedgerError, match="another key"):
            audit(ORDER, its, place, key)


def test_an_order_that_is_none_is_found(monkeypatch):
    state, place = resized()
    broken = lambda positions, length, **_: np.minimum(positions, length - 2)  # noqa: E731
    monkeypatch.setattr("disttrain.data.ledger.permute", broken)
    monkeypatch.setattr("disttrain.data.ledger.hmac.compare_digest", lambda *_: True)
    with pytest.raises(LedgerError, match="the order of epoch 0 does not have every sample once"):
        audit(ORDER, state, place)


def test_hashes_of_samples_differ():
    some = np.concatenate([np.arange(1 << 16), np.arange(1 << 16) << 32, np.arange(1, 1 << 16) << 20])
    # 31 bits: among n random hashes about n**2 / 2**32 pairs are equal
    assert len(np.unique(mixed(some))) >= len(np.unique(some)) - 4 * len(some) ** 2 / 2**32
    assert mixed(np.array([5], np.int32)) == mixed(np.array([5], np.uint64))
