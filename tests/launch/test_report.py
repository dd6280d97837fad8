"""Reports of failures: which was the first, and what an exit code tells of a signal."""

import signal

import pytest

from launch.report import Report, loss_in_words, read_reports, signal_in

MPICH = b"YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)\n"
OPEN_MPI = b"prterun noticed that process rank 1 with PID 4706 on node vm exited on\nsignal 9 (Killed).\n"


def test_the_first_failure_comes_first_whatever_its_rank(tmp_path):
    reports = [
        Report(rank=rank, world_size=12, host="h", time_s=time_s, exit_code=1, text="é \udc80\n")
        for rank, time_s in [(0, 3.0), (11, 1.0), (2, 2.0)]
    ]
    for report in reports:
        report.write(tmp_path)
    (tmp_path / "report.5.tmp").write_text("half of a rep")
    assert [report.rank for report in read_reports(tmp_path)] == [11, 2, 0]
    assert read_reports(tmp_path)[0] == reports[1]


@pytest.mark.parametrize(
    ("exit_code", "said", "number"),
    [
        (-11, b"", signal.SIGSEGV),
        (9, MPICH, signal.SIGKILL),
        (137, OPEN_MPI, signal.SIGKILL),
        (137, b"", signal.SIGKILL),
        (9, b"", 0),
        (1, b"", 0),
        (200, b"", 0),
    ],
)
def test_the_signal_that_ended_a_worker_is_known(exit_code, said, number):
    assert signal_in(exit_code, said) == number


def test_only_for_a_kill_memory_is_suspected():
    assert "memory" in loss_in_words(1, 2, 9, signal.SIGKILL)
    assert "memory" not in loss_in_words(1, 2, 11, signal.SIGSEGV)
    assert loss_in_words(None, 2, 7, 0) == "disttrain: a rank ended with exit code 7, without an exception\n"
