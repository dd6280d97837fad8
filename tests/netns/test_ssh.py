"""`disttrain run --launcher ssh` from a host to two others, each with a real sshd, that are network namespaces."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import disttrain
from tests.netns.network import Network, NoNetworkError
from tests.netns.ssh import NoSshError, Ssh

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[2]
HERE, FIRST, SECOND = 2, 0, 1  # the host of `disttrain run`, and those of workers
LIMIT_S = 30.0  # for what cannot be started
ARGUMENTS = ("--name", 'it\'s "a" $b', "ü")
JOIN = """
import os, signal, sys, time
import numpy as np
import disttrain as dt
comm = dt.init()
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Three hosts, and the folder from which jobs are started."""

    network: Network
    ssh: Ssh
    folder: Path

    @property
    def names(self):
        return ",".join(self.network.addresses[:2])

    def start(self, text, *options, hosts="", workers=2, arguments=ARGUMENTS, environ=(), **popen):
        (self.folder / "script.py").write_text(text)
        run = ["run", "-n", str(workers), "--launcher", "ssh", "-o", f"hosts={hosts or self.names}"]
        run += ["-o", f"ssh={' '.join(self.ssh.argv)}", *options, "script.py", *arguments]
        argv = self.network.command(HERE, [sys.executable, "-P", "-c", "from launch.cli import main; main()", *run])
        # Else UCX recognises the machine, and goes through its memory. As many tests do, this one imports a checkout.
        environ = {
            **os.environ,
            "UCX_TLS": "tcp,self",
            "PYTHONPATH": str(ROOT),
            "OURS": str(self.folder),
            "TMPDIR": str(self.folder.parent),  # one that is killed leaves its folder
            **dict(environ),
        }
        argv[argv.index("env") + 1] = f"--chdir={self.folder}"
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(argv, env=environ, **{**streams, **popen})

    def run(self, text, *options, **named):
        process = self.start(text, *options, **named)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def left(self):
        """Return processes of workers, on whatever host."""
        return [
            each.info["cmdline"]
            for each in psutil.process_iter(["cmdline"])
            if "launch.worker" in (each.info["cmdline"] or []) and each.is_running() and self._is_ours(each)
        ]

    def _is_ours(self, process):
        with contextlib.suppress(psutil.Error):
            return process.cwd() == str(self.folder)
        return False

    @contextlib.contextmanager
    def without(self, host, path):
        """Have nothing at `path` on a host."""
        subprocess.run(self.network.command(host, ["mount", "-t", "tmpfs", "none", path]), check=True)
        try:
            yield
        finally:
            subprocess.run(self.network.command(host, ["umount", path]), check=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network(3, rate=""))
            ssh = stack.enter_context(Ssh(network))
        except (NoNetworkError, NoSshError) as error:
            pytest.skip(str(error))
        yield Hosts(network=network, ssh=ssh, folder=tmp_path_factory.mktemp("ssh"))


def test_workers_meet_across_hosts_and_the_first_to_fail_is_named_with_its_host(hosts):
    text = JOIN + (
        "print(__name__, sys.argv[1:], os.getcwd(), comm.transport, comm.all_reduce(np.ones(3))[0], flush=True)\n"
        "print('err', os.environ['OURS'], file=sys.stderr, flush=True)\n"
        "comm.barrier()\n"
        "if comm.rank == 1: raise ValueError('on purpose')\n"
        "comm.barrier()\n"
    )
    done = hosts.run(text, "-o", "env=OURS")
    words = f"__main__ {list(ARGUMENTS)} {hosts.folder} tcp 2.0"
    assert sorted(done.stdout.splitlines()) == [f"[0] {words}", f"[1] {words}"], done.stderr
    assert {f"[{rank}] err {hosts.folder}" for rank in (0, 1)} <= set(done.stderr.splitlines())
    assert done.returncode == 1
    assert "rank 1 of 2 failed first, on host host1, exit code 1:\nTraceback" in done.stderr
    assert "\nValueError: on purpose\nrank 1 of 2, host host1\nMeanwhile rank 0: " in done.stderr
    assert hosts.left() == []


def test_a_host_that_cannot_be_reached_is_named(hosts):
    begin_s = time.monotonic()
    done = hosts.run("open('started', 'w')", hosts=f"{hosts.network.addresses[0]},10.77.0.99")
    assert done.returncode == 2
    assert "Error: host 10.77.0.99 cannot be reached by ssh" in done.stderr
    assert time.monotonic() - begin_s < LIMIT_S
    assert not (hosts.folder / "started").exists()


@pytest.mark.long
def test_a_job_runs_over_mpi(hosts):
    text = JOIN + "print(sys.argv[1:], os.getcwd(), comm.transport, comm.all_reduce(np.ones(3))[0])\n"
    interface = {"DISTTRAIN_INTERFACE": "eth0"}  # the names of such hosts are known to nobody
    done = hosts.run(text, "--transport", "mpi", arguments=("a b", "$c"), environ=interface)
    assert done.returncode == 0, done.stderr
    assert {f"[{rank}] ['a b', '$c'] {hosts.folder} mpi 2.0" for rank in (0, 1)} <= set(done.stdout.splitlines())


@pytest.mark.long
@pytest.mark.parametrize("slots", ["{0}:2,{1}:2", "{0} slots=2 # first\n\n{1}:1\n{1}\n"])
def test_ranks_fill_hosts_in_their_order_and_share_a_hosts_memory(hosts, slots):
    value = slots.format(*hosts.network.addresses)
    if "\n" in value:
        (hosts.folder / "hosts").write_text(value)
        value = "hosts"
    text = JOIN + (
        "local = comm.split(os.uname().nodename)\n"
        "print(os.uname().nodename, comm.local_rank, local.world_size, comm.all_reduce(np.ones(99999))[-1])\n"
    )
    done = hosts.run(text, hosts=value, workers=4)
    assert done.returncode == 0, done.stderr
    expected = [f"[{rank}] host{rank // 2} {rank % 2} 2 4.0" for rank in range(4)]
    assert sorted(done.stdout.splitlines()) == expected


@pytest.mark.long
@pytest.mark.parametrize(
    ("deed", "code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was ended by signal 9 (SIGKILL)"),
        ("os._exit(7)", 7, "ended with exit code 7, without an exception"),
        ("sys.exit(5)", 5, "SystemExit: 5"),
    ],
)
def test_a_rank_that_is_lost_far_away_is_named(hosts, deed, code, words):
    done = hosts.run(JOIN + f"comm.barrier()\nif comm.rank == 1: {deed}\ncomm.barrier()\n")
    assert done.returncode == code, done.stderr
    assert "rank 1 of 2 failed first, on host host1" in done.stderr
    assert words in done.stderr
    assert hosts.left() == []


@pytest.mark.long
@pytest.mark.parametrize("what", ["folder", "script", "interpreter", "version"])
def test_what_a_host_lacks_is_named_before_anything_starts(hosts, what, tmp_path):
    scripts = hosts.folder / "scripts"
    scripts.mkdir(exist_ok=True)
    script = scripts / "there.py"
    script.write_text("open('started', 'w')\n")
    begin_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        if what == "version":
            other = tmp_path / "__init__.py"
            original = Path(disttrain.__file__)
            other.write_text(original.read_text() + "\n__version__ = '0.0.1'\n")
            subprocess.run(hosts.network.command(SECOND, ["mount", "--bind", other, original]), check=True)
            unmount = hosts.network.command(SECOND, ["umount", original])
            stack.callback(subprocess.run, unmount, check=True)
        else:
            place = {"folder": hosts.folder.parent, "script": scripts, "interpreter": Path(sys.prefix, "bin")}[what]
            stack.enter_context(hosts.without(SECOND, place))
        done = hosts.run("", "scripts/there.py")
    reason = {
        "folder": f"expected there, as here: the folder {hosts.folder}",
        "script": f"does not have the script scripts/there.py in {hosts.folder}",
        "interpreter": f"expected there, as here: the folder {hosts.folder}, and {sys.executable} with disttrain",
        "version": f"has disttrain 0.0.1, expected {disttrain.__version__}, as here",
    }[what]
    assert done.returncode == 2, done.stderr
    assert f"Error: host {hosts.network.addresses[1]} " in done.stderr
    assert reason in done.stderr
    assert time.monotonic() - begin_s < LIMIT_S
    assert not (hosts.folder / "started").exists()


@pytest.mark.long
def test_a_rank_that_holds_up_the_others_far_away_is_named_with_its_stack(hosts):
    text = (
        "import time\n"
        "import numpy as np\n"
        "import disttrain as dt\n"
        "class Stuck(dt.layers.Dense):\n"
        "    calls = 0\n"
        "    def call(self, x):\n"
        "        Stuck.calls += 1\n"
        "        time.sleep(0.02)\n"
        "        while dt.init().rank == 1 and Stuck.calls > 100: pass\n"
        "        return super().call(x)\n"
        "model = dt.Sequential([Stuck(1, input_shape=(8,))])\n"
        "model.compile(optimizer='sgd', loss='mse', static=False)\n"
        "x = np.ones((400, 8), 'float32')\n"
        "model.fit(x, x[:, :1], batch_size=20, epochs=100, verbose=0)\n"
    )
    done = hosts.run(text, "--hang-timeout", "3")
    assert done.returncode == 124, done.stderr
    assert re.search(r"rank 1 of 2 is stuck, on host host1, pid \d+, for 3\.\d s", done.stderr)
    assert "while dt.init().rank == 1 and Stuck.calls > 100: pass" in done.stderr
    assert re.search(r"Meanwhile rank 0: step \d+, bucket 0; waits in all_reduce", done.stderr)
    assert hosts.left() == []


SLEEP = JOIN + (
    "def saved(number, frame):\n"
    "    open(f'saved.{comm.rank}', 'w').write(signal.Signals(number).name)\n"
    "    os._exit(0)\n"
    "signal.signal(signal.SIGTERM, saved)\n"
    "signal.signal(signal.SIGUSR1, saved)\n"
    "comm.barrier()\n"
    "open(f'up.{comm.rank}', 'w').write('up')\n"
    "time.sleep(100)\n"
)


@pytest.fixture
def sleeping(hosts):
    """Start a job that sleeps; yield the process of `disttrain run`."""
    for file in [*hosts.folder.glob("up.*"), *hosts.folder.glob("saved.*")]:
        file.unlink()
    process = hosts.start(SLEEP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    await_true(lambda: len(list(hosts.folder.glob("up.*"))) == 2, 60)
    yield process
    process.kill()
    process.wait()


def await_true(holds, limit_s):
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_asks_for_the_end_reaches_all_ranks(hosts, sleeping, number):
    sleeping.send_signal(number)
    assert sleeping.wait(60) == 128 + number
    assert [Path(hosts.folder, f"saved.{rank}").read_text() for rank in (0, 1)] == [number.name] * 2
    assert hosts.left() == []


@pytest.mark.long
def test_workers_end_when_disttrain_run_is_killed(hosts, sleeping):
    sleeping.kill()
    await_true(lambda: not hosts.left(), 60)
    assert [Path(hosts.folder, f"saved.{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2


@pytest.mark.long
def test_workers_end_when_the_connection_breaks_and_the_host_is_named(hosts):
    """The sshd of one connection is killed: ssh ends, and at the other end the outpost hears no more."""
    for file in hosts.folder.glob("up.*"):
        file.unlink()
    process = hosts.start(SLEEP)
    await_true(lambda: len(list(hosts.folder.glob("up.*"))) == 2, 60)
    for session in psutil.Process(hosts.ssh.daemons[SECOND].pid).children():
        session.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"the connection to host {hosts.network.addresses[1]} is lost" in err
    await_true(lambda: not hosts.left(), 60)
