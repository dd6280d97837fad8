"""The state of the last step is whole, or the one before it is: whatever cuts a write short, or alters a byte."""

import os
import random
import signal
import stat

import pytest

from disttrain import last_step
from disttrain.last_step import LastStep


@pytest.fixture
def made():
    last = LastStep.make()
    if last is None:
        pytest.skip("this system has no memfd_create")
    yield last
    last.close()


def state(step, size=5000):
    return random.Random(step).randbytes(size)


def test_nothing_is_there_at_first(made):
    assert made.read() is None


def test_the_newest_is_read_by_another_process(made):
    for step in range(1, 4):
        made.write(step, [state(step)[:7], memoryview(state(step))[7:]])
    assert made.read() == (3, state(3))
    child = os.fork()
    if child == 0:
        other = LastStep.at(made.address)
        seen = other.read() == (3, state(3))
        other.write(4, [state(4)])
        os._exit(0 if seen else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert made.read() == (4, state(4))


def test_only_the_same_user_may_open_it(made):
    assert all(stat.S_IMODE(os.stat(f"/proc/self/fd/{file}").st_mode) == 0o600 for file in made._files)


def test_another_file_is_refused(made):
    pid, first, second, _ = made.address.split(":")
    with pytest.raises(OSError, match="another file"):
        LastStep.at(f"{pid}:{first}:{second}:disttrain-of-somebody-else")


@pytest.mark.parametrize("sizes", [(5000, 5000), (9000, 100), (100, 9000)])
def test_a_write_that_is_cut_short_leaves_the_one_before(made, monkeypatch, sizes):
    """A process is killed after each operation in turn, or in the middle of its bytes."""
    put, done = last_step._put, []

    def cut(file, data, at):
        if len(done) == stops_at[0]:
            put(file, data[: int(len(data) * stops_at[1])], at)
            raise InterruptedError
        done.append(at)
        return put(file, data, at)

    for step in (1, 2):
        made.write(step, [state(step, sizes[0])])
    monkeypatch.setattr(last_step, "_put", cut)
    for number in range(4):  # the head struck out, two chunks, the head
        for share in (0, 0.3, 0.9):
            stops_at, done = (number, share), []
            data = state(3, sizes[1])
            with pytest.raises(InterruptedError):
                made.write(3, [data[:50], data[50:]])
            found = LastStep.at(made.address)
            assert found.read() == (2, state(2, sizes[0])), stops_at
            found.close()


def test_a_byte_that_was_altered_is_noticed(made):
    made.write(1, [state(1)])
    made.write(2, [state(2)])
    newest = made._files[0]
    size = os.fstat(newest).st_size
    for at in [*range(last_step._BEGIN), *random.Random(0).sample(range(last_step._BEGIN, size), 200)]:
        (before,) = os.pread(newest, 1, at)
        os.pwrite(newest, bytes([before ^ 1 << at % 8]), at)
        assert made.read() == (1, state(1)), at
        os.pwrite(newest, bytes([before]), at)
    assert made.read() == (2, state(2))


def test_a_process_that_is_killed_while_it_writes(made):
    """Whatever was reported is there, or something newer, and whole."""
    chance = random.Random(0)
    for _ in range(20):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            last = LastStep.at(made.address)
            step = (last.read() or (0,))[0]
            while True:
                step += 1
                last.write(step, [state(step, 200_000)])
                os.write(writer, step.to_bytes(8, "little"))
        os.close(writer)
        first = os.read(reader, 8)
        signal.sigtimedwait([], chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reader, "rb") as pipe:
            reported = int.from_bytes((first + pipe.read())[-8:], "little")
        step, data = made.read()
        assert step >= reported
        assert data == state(step, 200_000)
