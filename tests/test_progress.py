"""The record of a rank's progress: what is noted is read, from outside too, and survives the process."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

import disttrain as dt
from disttrain import progress
from disttrain.progress import Phase


@pytest.fixture(autouse=True)
def _private_record():
    yield
    progress._forget()


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "progress.1"
    progress.keep(path, 1, 3)
    return path


def test_a_record_says_whose_it_is(kept):
    record = progress.read(kept)
    assert (record.rank, record.world_size, record.pid) == (1, 3, os.getpid())
    assert (record.step, record.phase, record.is_waiting, record.peer) == (None, Phase.SCRIPT, False, None)
    assert record.words == "the script's own code, before its first step"
    assert kept.stat().st_mode & 0o777 == 0o600


def test_step_phase_and_call_are_read_as_they_were_noted(kept):
    progress.begin_run()
    progress.begin_step(7)
    assert progress.read(kept).words == "step 7, forward"
    progress.at(Phase.BUCKET, 2)
    progress.waits(progress.call(23, "all_reduce", "f", 4, 4096))
    assert progress.read(kept).words == "step 7, bucket 2; waits in all_reduce 23 (float32, 4096 bytes)"
    progress.waits_for(2)
    record = progress.read(kept)
    assert record.words.endswith("waits in all_reduce 23 (float32, 4096 bytes), for rank 2")
    assert (record.call, record.peer, record.is_waiting) == ((23, "all_reduce", "float32", 4096), 2, True)
    progress.goes_on()
    assert progress.read(kept).words == "step 7, bucket 2"
    progress.at(Phase.CHECKPOINT)
    assert progress.read(kept).words == "checkpoint, after step 7"


def test_time_is_added_to_what_it_was_spent_on(kept, monkeypatch):
    now_ns = iter(range(0, 1 << 20, 1 << 10))  # each look at the clock is 1024 ns later
    monkeypatch.setattr(progress, "monotonic_ns", lambda: next(now_ns))
    progress.at(Phase.DATA)
    before = progress.read(kept).spent

    def added():
        nonlocal before
        last, before = before, progress.read(kept).spent
        return {word: ns // 1024 for word, ns in (Counter(before._asdict()) - Counter(last._asdict())).items()}

    progress.begin_step(0, 5)
    progress.begin_step(1, 3)
    assert progress.read(kept).samples == 8
    assert added() == {"data": 1}
    progress.at(Phase.BACKWARD)
    progress.at(Phase.METRICS)
    assert added() == {}  # what was begun last is added when it ends
    progress.waits(progress.call(1, "all_reduce", "f", 4, 64))
    assert added() == {"compute": 1}
    began = progress.sends()
    progress.has_sent(began)
    progress.waits_for(2)
    assert added() == {"waiting": 1, "network": 1}
    progress.waits_for(2, to_send=True)
    progress.waits_for(1)
    assert added() == {"waiting": 1, "network": 1}
    progress.goes_on()
    progress.at(Phase.BUCKET)
    progress.at(Phase.CALLBACK)
    assert added() == {"waiting": 1, "compute": 1, "network": 1}
    with progress.phase(Phase.CHECKPOINT):
        assert added() == {"callbacks": 1}
    progress.at(Phase.SHUTDOWN)
    assert added() == {"callbacks": 1}  # and nothing of the checkpoint


def test_the_clock_is_looked_at_only_where_something_else_begins(kept, monkeypatch):
    looks = []
    monkeypatch.setattr(progress, "monotonic_ns", lambda: looks.append(1) or 0)
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.METRICS, Phase.OPTIMIZER):
        progress.at(phase)
    progress.waits(progress.call(1, "all_reduce", "f", 4, 64))
    progress.waits_for(1)
    progress.goes_on()
    assert len(looks) == 3


def test_time_spent_does_not_make_another_record(kept):
    before = progress.read(kept)
    progress.has_sent(progress.sends())
    after = progress.read(kept)
    assert after.spent != before.spent
    assert after == before  # the watch looks for what does not change


def test_waiting_again_for_an_equal_message_changes_the_record(kept):
    message = progress.call(0, "recv", "b", 1, 8)
    progress.waits(message, 2)
    before = progress.read(kept)
    assert before.words.endswith("waits in recv (bool, 8 bytes), for rank 2")
    progress.goes_on()
    progress.waits(message, 2)
    assert progress.read(kept) != before


@pytest.mark.parametrize("content", [None, b"", b"\0" * 256, b"half"])
def test_what_is_no_record_yet_is_none(tmp_path, content):
    path = tmp_path / "progress.0"
    if content is not None:
        path.write_bytes(content)
    assert progress.read(path) is None


def test_a_phase_ends_with_its_block_and_its_error_says_where_it_arose(kept):
    def fail():
        with progress.phase(Phase.CHECKPOINT), progress.phase(Phase.EVALUATION):
            progress.at(Phase.EVALUATION, 4)
            raise LookupError

    with pytest.raises(LookupError) as caught:
        fail()
    assert not hasattr(caught.value, "__notes__")  # no step was taken: the traceback says as much
    progress.begin_step(3)
    with pytest.raises(LookupError) as caught:
        fail()
    assert caught.value.__notes__ == ["evaluation, batch 4, after step 3"]
    assert progress.read(kept).words == "step 3, forward"


def test_the_record_outlives_its_process(tmp_path):
    path = tmp_path / "progress.0"
    text = f"""
import os, pathlib
from disttrain import progress
progress.keep(pathlib.Path({str(path)!r}), 0, 1)
progress.begin_step(41)
os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    assert subprocess.run([sys.executable, "-c", text], timeout=60, check=False).returncode == -signal.SIGKILL
    assert progress.read(path).words == "step 41, forward"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_leaves_its_parents_record_alone(kept):
    pid = os.fork()
    if not pid:
        progress.begin_step(99)
        os._exit(progress.is_kept())
    assert os.waitpid(pid, 0)[1] == 0
    assert progress.read(kept).step is None
    assert progress.is_kept()


def test_a_reader_never_sees_half_a_word(kept):
    done = threading.Event()

    def write():
        while not done.is_set():
            progress.at(Phase.DATA, 0)
            progress.at(Phase.EVALUATION, (1 << 48) - 1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {(record.phase, record.number) for record in (progress.read(kept) for _ in range(3000))}
    finally:
        done.set()
        writer.join()
    assert seen <= {(Phase.SCRIPT, 0), (Phase.DATA, 0), (Phase.EVALUATION, (1 << 48) - 1)}


def test_a_training_passes_through_the_phases_in_their_order(monkeypatch, tmp_path):
    noted = []
    monkeypatch.setattr(progress, "at", lambda phase, number=0: noted.append((phase, number)))
    monkeypatch.setattr(progress, "begin_step", lambda number, samples: noted.append((Phase.FORWARD, number)))
    model = dt.Sequential([dt.layers.Dense(2, input_shape=(3,))])
    model.compile("sgd", "mse", static=False)
    x = np.ones((4, 3))
    with dt.comm.use(dt.comm.connect("local")):
        model.fit(x, x[:, :2], batch_size=2, verbose=0, validation_data=(x, x[:, :2]))
        # the last bucket is summed where it starts, and is seen to be through at the end of backward
        step = [(Phase.FORWARD, None), (Phase.BACKWARD, 0), (Phase.BUCKET, 0), (Phase.BACKWARD, 1), (Phase.BUCKET, 0)]
        step = [*step, (Phase.METRICS, 0), (Phase.OPTIMIZER, 0), (Phase.CALLBACK, 0), (Phase.DATA, 0)]
        step = [*step, (Phase.CALLBACK, 0)]
        start = noted.index((Phase.FORWARD, 0))
        assert [(p, None if p == Phase.FORWARD else n) for p, n in noted[start : start + 11]] == [*step, step[0]]
        assert [entry for entry in noted if entry[0] == Phase.VALIDATION][-2:] == [
            (Phase.VALIDATION, 0),
            (Phase.VALIDATION, 1),
        ]
        noted.clear()
        model.save(tmp_path)
        model.predict(x)
        model.evaluate(x, x[:, :2])
    assert [phase for phase, _ in noted] == [Phase.CHECKPOINT, Phase.PREDICTION, Phase.EVALUATION, Phase.EVALUATION]
