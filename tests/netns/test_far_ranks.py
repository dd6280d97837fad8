"""Ranks that an MPI starts on another host are watched, reported and ended as those beside `disttrain run`."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from launch.mpirun import find_mpi
from tests.launch.test_away import ENDS, TRAIN
from tests.netns.network import Network, NoNetworkError
from tests.netns.ssh import NoSshError, Ssh
from tests.netns.test_ssh import JOIN, ROOT, SLEEP, await_true

pytestmark = [pytest.mark.timeout(180), pytest.mark.long]

FAR = "host1"


class Job:
    """`disttrain run` on host 0 for a rank there and two on host 1, which MPICH's mpiexec starts by ssh."""

    def __init__(self, network, ssh, folder):
        self.network, self.ssh, self.folder = network, ssh, folder
        (folder / "temporary").mkdir()
        for host in range(2):  # as on real hosts; the rest of the file system is shared
            self.on(host, "mount", "-t", "tmpfs", "none", folder / "temporary")
        (folder / "hosts").write_text("".join(f"{address}:{n}\n" for n, address in enumerate(network.addresses, 1)))

    def on(self, host, *argv):
        command = self.network.command(host, argv)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def start(self, text, *options, arguments=(), environ=(), **popen):
        (self.folder / "script.py").write_text(text)
        run = ["run", "-n", "3", "--launcher", "mpirun", "-o", "mpiexec=-f hosts -iface eth0 -launcher ssh", *options]
        program = [sys.executable, "-P", "-c", "from launch.cli import main; main()"]
        argv = self.network.command(0, [*program, *run, "script.py", *arguments])
        argv[argv.index("env") + 1] = f"--chdir={self.folder}"
        environ = {
            **os.environ,
            "HYDRA_LAUNCHER_EXTRA_ARGS": " ".join(self.ssh.argv[1:]),
            "UCX_TLS": "tcp,self",  # else UCX recognises the machine, and goes through its memory
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.folder / "temporary"),
            **dict(environ),
        }
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(argv, env=environ, **{**streams, **popen})

    def run(self, text, *options, **named):
        process = self.start(text, *options, **named)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def left(self):
        """Return processes of the job, and temporary files of it, on both hosts."""
        files = [line for host in range(2) for line in self.on(host, "ls", self.folder / "temporary").split()]
        return files + [each.cmdline() for each in psutil.process_iter() if self._is_ours(each)]

    def _is_ours(self, process):
        with contextlib.suppress(psutil.Error):
            return process.cwd() == str(self.folder)
        return False


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    if find_mpi().flavour != "mpich":
        pytest.skip("these are the options of MPICH's mpiexec")
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network(2, rate=""))
            ssh = stack.enter_context(Ssh(network))
        except (NoNetworkError, NoSshError) as error:
            pytest.skip(str(error))
        yield Job(network, ssh, tmp_path_factory.mktemp("far"))


def test_what_they_write_is_labelled(job):
    done = job.run(JOIN + "print(os.uname().nodename, comm.transport, comm.all_reduce(np.ones(3))[0])\n")
    assert done.returncode == 0, done.stderr
    assert {"[0] host0 mpi 3.0", "[1] host1 mpi 3.0", "[2] host1 mpi 3.0"} <= set(done.stdout.splitlines())
    await_true(lambda: not job.left(), 30)


@pytest.mark.parametrize("deed", ENDS)
def test_whatever_ends_one_is_named_with_its_place_and_what_the_others_did(job, deed):
    done = job.run(TRAIN, "--hang-timeout", "3", arguments=[deed])
    code, words = ENDS[deed]
    assert done.returncode == code, done.stderr
    for each in words:
        assert each.format(host=FAR).replace("of 2", "of 3") in done.stderr
    # What is known of rank 2 may be a fifth of a second old.
    others = re.findall(r"^Meanwhile ranks? ([\d, ]+): step \d+, ", done.stderr, re.MULTILINE)
    assert sorted(", ".join(others).split(", ")) == ["0", "2"], done.stderr
    await_true(lambda: not job.left(), 30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_signals_that_ask_for_the_end_reach_them(job, number):
    for file in [*job.folder.glob("up.*"), *job.folder.glob("saved.*")]:
        file.unlink()
    process = job.start(SLEEP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_true(lambda: len(list(job.folder.glob("up.*"))) == 3, 60)
    process.send_signal(number)
    assert process.wait(60) in (128 + number, -number)
    await_true(lambda: not [each for each in job.left() if isinstance(each, list)], 60)
    if number != signal.SIGKILL:  # who is killed leaves its folder
        assert [(job.folder / f"saved.{rank}").read_text() for rank in range(3)] == [number.name] * 3
        assert job.left() == []


def test_a_host_that_is_lost_is_named(job):
    for file in job.folder.glob("up.*"):
        file.unlink()
    process = job.start(SLEEP)
    await_true(lambda: len(list(job.folder.glob("up.*"))) == 3, 60)
    job.on(1, "ip", "link", "set", "eth0", "down")
    try:
        begin_s = time.monotonic()
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        assert re.search(r"rank [12] of 3 failed first, on host host1.*:\nthe connection to host host1 is lost: ", err)
        assert time.monotonic() - begin_s < 60
        await_true(lambda: not job.left(), 90)  # as nobody speaks to them, they have half a minute to save
    finally:
        job.on(1, "ip", "link", "set", "eth0", "up")


def test_ranks_that_do_not_reach_it_say_so_and_run(job):
    begin_s = time.monotonic()
    done = job.run(JOIN + "print(comm.rank)\n", environ={"DISTTRAIN_INTERFACE": "lo"})
    assert done.returncode == 0, done.stderr
    assert {"[0] 0", "[1] 1", "[2] 2"} <= set(done.stdout.splitlines())  # labelled by MPICH
    assert re.search(r"rank 1 is not watched: disttrain run at 127\.0\.0\.1:\d+ cannot be reached", done.stderr)
    assert time.monotonic() - begin_s < 60
