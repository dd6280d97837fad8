"""The launchers of clusters are pure functions from a job to command lines, which `--dry-run` prints."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys

import pytest

from disttrain import env
from disttrain.errors import ConfigError, LaunchError
from launch import slurm, ssh
from launch.job import Command, Job, across_hosts, as_shell
from launch.mpirun import Mpi
from launch.outpost import Messages, message, ranks_in
from launch.report import Told, told
from launch.slurm import Allocation
from launch.ssh import Host

JOB = Job(workers=3, script="train.py", arguments=("--name", "it's $a b"), python="/env/bin/python")
WORKER = ("/env/bin/python", "-P", "-m", "launch.worker", "train.py", "--name", "it's $a b")
HOSTS = [Host(name="node1", slots=2), Host(name="me@node2", slots=1)]
MPICH = Mpi(mpiexec="/env/bin/mpiexec", flavour="mpich")


def test_ssh_has_a_command_for_each_host_which_says_which_ranks_are_there():
    first, second = ssh.own_commands(JOB, HOSTS, ["ssh", "-T"], {"DISTTRAIN_THREADS": "2"}, "/data/my folder")
    assert first.argv[:7] == ("/env/bin/python", "-P", "-m", "launch.far", "0-1/3", "node1", "2")
    assert first.argv[7:-1] == ("ssh", "-T", "node1")
    assert second.argv[4:-1] == ("2-2/3", "me@node2", "2", "ssh", "-T", "me@node2")
    folder, outpost = first.argv[-1].split(" && ")
    assert shlex.split(folder) == ["cd", "/data/my folder"]
    settings = ["DISTTRAIN_THREADS=2", "DISTTRAIN_TRANSPORT=tcp"]
    python = ["/env/bin/python", "-P", "-m", "launch.outpost"]
    assert shlex.split(outpost) == ["exec", "env", *settings, *python, "0-1/3", *JOB.worker[4:]]


def test_one_worker_needs_no_transport():
    (line,) = ssh.own_commands(Job(workers=1, script="s.py"), HOSTS[:1], ["ssh"], {}, "/")
    assert "DISTTRAIN_TRANSPORT" not in line.argv[-1]


def test_mpich_starts_an_mpi_job_by_the_same_ssh():
    line = ssh.mpi_command(JOB, HOSTS, ["ssh", "-F", "my config"], MPICH)
    where = ("-launcher", "ssh", "-launcher-exec", "ssh", "-hosts", "node1:2,me@node2:1")
    assert line.argv == ("/env/bin/mpiexec", *where, "-n", "3", "-prepend-rank", *WORKER)
    assert line.env == {"HYDRA_LAUNCHER_EXTRA_ARGS": "-F 'my config'"}
    with pytest.raises(LaunchError, match="mpirun --hostfile FILE"):
        ssh.mpi_command(JOB, HOSTS, ["ssh"], Mpi(mpiexec="mpirun", flavour="openmpi"))


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", {"node1": 1}),
        ("node1:2\nme@node2:3\n", {"node1": 2, "me@node2": 3}),
        ("# ours\nnode1 slots=4 max_slots=8  # big\n\nnode2 max-slots=2\n", {"node1": 4, "node2": 1}),
        ("node1\nnode2\nnode1\n", {"node1": 2, "node2": 1}),
        ("[fe80::1]:2\n10.0.0.1\n", {"fe80::1": 2, "10.0.0.1": 1}),
    ],
)
def test_host_files_are_as_open_mpi_and_mpich_have_them(tmp_path, text, hosts):
    file = tmp_path / "hosts"
    file.write_text(text)
    assert {host.name: host.slots for host in ssh.hosts_of(str(file))} == hosts
    listed = ",".join(f"[{name}]:{slots}" if "::" in name else f"{name}:{slots}" for name, slots in hosts.items())
    assert {host.name: host.slots for host in ssh.hosts_of(listed)} == hosts


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "needs hosts: -o hosts=FILE"),
        ("no/such/file", "there is no such file"),
        (",", "names no host"),
        ("-oProxyCommand=evil", "expected a host"),
        ("node1;id", "expected a host"),
        ("node1:two", "expected a host"),
        ("node1 slots=two", "expected a host"),
        ("node1:2 slots=2", "expected a host"),
        ("node1:0", "at least one slot"),
    ],
)
def test_what_is_no_host_is_refused(value, words):
    with pytest.raises(ConfigError, match=words):
        ssh.hosts_of(value)


def test_hosts_are_filled_in_their_order():
    assert ssh.taken(HOSTS, 3) == HOSTS
    assert ssh.taken(HOSTS, 1) == [Host(name="node1", slots=1)]
    with pytest.raises(LaunchError, match="4 workers need as many slots, and the hosts have 3: node1:2, me@node2:1"):
        ssh.taken(HOSTS, 4)


def test_no_secret_is_passed_on_in_a_command_line():
    environ = {
        "DISTTRAIN_SECRET": "hush", "DISTTRAIN_RENDEZVOUS": "a:1", "DISTTRAIN_LAST_STEP": "1", "DISTTRAIN_RANK": "7",
        "DISTTRAIN_DATA": "/data", "PYTHONPATH": "/lib", "OMP_NUM_THREADS": "1", "HOME": "/root", "WANTED": "x",
    }  # fmt: skip
    expected = {"DISTTRAIN_DATA": "/data", "PYTHONPATH": "/lib", "OMP_NUM_THREADS": "1"}
    assert ssh.passed_on(environ, "") == expected
    assert ssh.passed_on(environ, "WANTED, HOME") == {**expected, "WANTED": "x", "HOME": "/root"}
    with pytest.raises(ConfigError, match="WANTD is not set here"):
        ssh.passed_on(environ, "WANTD")


def test_slurm_starts_tasks_that_meet_at_the_first_node():
    line = slurm.command(JOB, Allocation(nodes=2, address="node1", cpus=4), 20001, "hush", {})
    options = ("--ntasks", "3", "--label", "--kill-on-bad-exit=1", "--export=ALL", "--cpus-per-task=4", "--mpi=none")
    gate = ("/env/bin/python", "-P", "-m", "launch.gate", "3", "node1")
    assert line.argv == (*gate, "env", "--ignore-signal=TERM", "srun", *options, *WORKER)
    assert line.env == {
        "DISTTRAIN_TRANSPORT": "tcp", "DISTTRAIN_RENDEZVOUS": "node1:20001", "DISTTRAIN_SECRET": "hush",
    }  # fmt: skip
    assert line.asked == signal.SIGUSR1
    assert slurm.command(JOB, Allocation(nodes=1, address="node1"), 20001, "hush", {}).argv[0] == "env"


def test_what_the_user_says_goes_first_under_slurm():
    environ = {"DISTTRAIN_RENDEZVOUS": "head:1", "DISTTRAIN_SECRET_FILE": "/s"}
    job = Job(workers=2, script="s.py", options={"srun": "--overcommit --gpus-per-task=1"})
    line = slurm.command(job, Allocation(nodes=2, address="node1", tasks=1), 1, "hush", environ)
    assert line.env == {"DISTTRAIN_TRANSPORT": "tcp"}
    assert line.argv[line.argv.index("--mpi=none") + 1 :][:2] == ("--overcommit", "--gpus-per-task=1")
    mpi = Job(workers=2, script="s.py", transport="mpi", options={"srun": "--mpi=pmi2"})
    assert "--mpi=none" not in slurm.command(mpi, Allocation(nodes=2, address="node1"), 1, "hush", {}).argv


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Job(workers=3, script="s.py"), "2 task.s., and 3 workers are asked for: sbatch --ntasks 3"),
        (Job(workers=2, script="s.py", transport="shm"), "share no memory"),
    ],
)
def test_what_cannot_be_started_in_an_allocation_is_refused(job, words):
    with pytest.raises(LaunchError, match=words):
        slurm.command(job, Allocation(nodes=2, address="node1", tasks=2), 1, "", {})


def test_a_quote_that_does_not_end_is_refused():
    with pytest.raises(ConfigError, match="-o ssh=ssh -F 'x: No closing quotation"):
        Job(workers=1, script="s.py", options={"ssh": "ssh -F 'x"}).words("ssh")


def test_outside_of_an_allocation_the_way_into_one_is_named():
    with pytest.raises(LaunchError, match=r"SLURM_JOB_NODELIST is not set.*train\.sbatch"):
        slurm.allocation({})


def test_srun_tells_of_the_first_task_that_failed():
    said = b"0: a line\nsrun: error: node2: task 1: %b\nsrun: error: node1: task 0: Terminated\n"
    assert told(said % b"Exited with exit code 3") == Told(rank=1, host="node2", code=3, number=0)
    assert told(said % b"Killed") == Told(rank=1, host="node2", code=137, number=9)
    assert told(said % b"Segmentation fault (core dumped)") == Told(rank=1, host="node2", code=139, number=11)
    assert told(b"0: a line\n") is None


def test_messages_stand_out_from_what_a_shell_writes():
    messages = Messages()
    data = b"Welcome!\n$ " + message("out", 1, "a\n") + b"bye\n" + message("end", 0)
    found = [each for byte in data for each in messages.feed(bytes([byte]))]
    assert found == [["out", 1, "a\n"], ["end", 0]]
    assert messages.other == b"Welcome!\n$ \nbye\n"
    assert ranks_in("2-3/8") == (range(2, 4), 8)


def test_a_dry_run_prints_lines_that_a_shell_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Job, "worker", ("sh", "-c", 'echo "$DISTTRAIN_RANK $0 $1"', "it's $a b", "*"))
    text = as_shell(Job(workers=2, script="s.py", launcher="local", transport="tcp"))
    assert "export DISTTRAIN_TRANSPORT=tcp" in text
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    assert sorted(done.stdout.splitlines()) == ["0 it's $a b *", "1 it's $a b *"]


def test_a_dry_run_across_hosts_prints_lines_that_a_shell_runs(tmp_path, monkeypatch):
    line = across_hosts(JOB, Command(argv=("echo", "it's $a b")), "node1", "hush", {})
    gate = (sys.executable, *line.argv[1:])
    monkeypatch.setattr("launch.job.commands", lambda job: [dataclasses.replace(line, argv=gate)])
    done = subprocess.run(["sh", "-c", as_shell(JOB)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "it's $a b\n"), done.stderr


def test_who_hears_of_other_hosts_has_a_secret():
    line = Command(argv=("srun",), env={"A": "b"})
    gate = ("/env/bin/python", "-P", "-m", "launch.gate", "3", "", "srun")
    assert across_hosts(JOB, line, "", "hush", {}) == Command(argv=gate, env={"A": "b", "DISTTRAIN_SECRET": "hush"})
    for name in ("DISTTRAIN_SECRET", "DISTTRAIN_SECRET_FILE"):
        assert across_hosts(JOB, line, "", "hush", {name: "own"}).env == {"A": "b"}


def test_a_rank_that_nobody_watches_tells_its_failure_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("raise ValueError('on purpose')\n")
    text = as_shell(Job(workers=1, script="script.py", launcher="local"))
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ValueError: on purpose" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_of_ranks_that_were_asked_to_end_out_of_reach_only_the_first_has_the_code(tmp_path, rank):
    """srun ends all tasks when one ends with another code than 0, also those that have still something to say."""
    (tmp_path / "script.py").write_text("import disttrain\nraise disttrain.errors.Preempted('received SIGTERM')\n")
    place = {"DISTTRAIN_RANK": str(rank), "DISTTRAIN_WORLD_SIZE": "2"}
    command = [sys.executable, "-P", "-m", "launch.worker", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **place}, capture_output=True, check=False)
    assert done.returncode == (0 if rank else 75)


@pytest.mark.parametrize(("node", "tasks"), [(0, 2), (2, 2), (3, 1), (9, 1)])
def test_each_node_of_a_step_has_its_own_number_of_tasks(node, tasks):
    environ = {"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "0", "SLURM_NODEID": str(node)}
    assert env.place({**environ, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}).local_size == tasks


def test_a_dry_run_shows_no_secret(monkeypatch):
    line = Command(argv=("srun",), env={"DISTTRAIN_SECRET": "hush"})
    monkeypatch.setattr("launch.job.commands", lambda job: [line])
    assert as_shell(JOB).splitlines()[-1] == 'DISTTRAIN_SECRET="$(openssl rand -hex 32)" srun'
