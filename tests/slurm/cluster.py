"""A real Slurm on this machine: two nodes and a controller, each in network namespaces of its own.

    with Cluster() as slurm:
        slurm.run("sinfo")

or, for a look, as a program, which runs a command on the controller's host:

    python -m tests.slurm.cluster -- bash

Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Nothing of it is left when it has ended; a job that
goes on is ended with its node's daemon.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from launch import posix
from tests.netns.network import Network, NoNetworkError

PROGRAMS = ("slurmctld", "slurmd", "srun", "munged")
NODES = ("node1", "node2")
START_S = 60.0

_CONF = """
ClusterName=test
SlurmctldHost=controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SwitchType=switch/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerParameters=batch_sched_delay=0,sched_interval=1
JobRequeue=1
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=9 State=UP
"""


class NoSlurmError(Exception):
    """This machine has no Slurm, or cannot start one."""


class Cluster(contextlib.AbstractContextManager):
    """A controller, which is host 2 of its network, and two nodes of one or more CPUs."""

    def __init__(self, cpus=2):
        self._cpus = cpus
        self._stack = contextlib.ExitStack()
        self._daemons = []

    def __enter__(self):
        if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
            raise NoSlurmError(f"there is no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
        try:
            self._start()
        except BaseException as error:
            self._stack.close()
            if isinstance(error, NoNetworkError):
                raise NoSlurmError(str(error)) from error
            raise
        return self

    def __exit__(self, *error):
        self._stack.close()

    def run(self, *argv, host=2, **options):
        """Run `argv` on a host; return the finished process, with what it wrote."""
        command = self._network.command(host, argv)
        return subprocess.run(
            command, **{"capture_output": True, "text": True, "timeout": 120, "env": self.env, **options}
        )

    def _start(self):
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        self.folder.chmod(0o755)
        self._network = self._stack.enter_context(Network(hosts=3, rate=""))
        names = [*NODES, "controller"]
        hosts = [f"{address} {name}" for address, name in zip(self._network.addresses, names, strict=True)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        nodes = [f"NodeName={name} CPUs={self._cpus} State=UNKNOWN" for name in NODES]
        (self.folder / "slurm.conf").write_text(_CONF.format(folder=self.folder, nodes="\n".join(nodes)))
        (self.folder / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\n"
        )  # not used; v2 asks for a system of its own
        self.env = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "DISTTRAIN_"))
        } | {"SLURM_CONF": str(self.folder / "slurm.conf"), "TMPDIR": str(self.folder / "tmp")}
        (self.folder / "tmp").mkdir()
        for host, name in enumerate(names):
            self.run("hostname", name, host=host, check=True)
            # As on real nodes; the rest of the file system is shared.
            self.run("mount", "-t", "tmpfs", "none", self.folder / "tmp", host=host, check=True)
            self.run("mount", "--bind", self.folder / "hosts", "/etc/hosts", host=host, check=True)
        self._stack.callback(self._end)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(2, "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge)
        self._await(lambda: (self.folder / "munge.socket").exists(), "munged")
        (self.folder / "state").mkdir()
        self._daemon(2, "slurmctld", "-D")
        for host, name in enumerate(NODES):
            (self.folder / f"spool.{name}").mkdir()
            self._daemon(host, "slurmd", "-D")
        self._await(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.split() == ["2"], "the nodes")

    def _daemon(self, host, *argv):
        log = self._stack.enter_context((self.folder / f"{argv[0]}.{host}.out").open("w"))
        command = self._network.command(host, argv)
        self._daemons.append(
            subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=posix.die_with_parent,
            )
        )

    def _await(self, is_there, what):
        end_s = time.monotonic() + START_S
        while not is_there():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > end_s:
                logs = "".join(f"{log.name}: {log.read_text()[-2000:]}\n" for log in self.folder.glob("*.out"))
                logs += "".join(f"{log.name}: {log.read_text()[-2000:]}\n" for log in self.folder.glob("*.log"))
                raise NoSlurmError(f"{what} did not come, {ended} ended:\n{logs}")
            time.sleep(0.1)

    def _end(self):
        """End the daemons, and what they have started: a step outlives its node's daemon, and is nobody's child."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    process.kill()
                    process.wait(10)
        for daemon in self._daemons:
            daemon.wait()


def main():
    argv = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else ["bash"]
    with Cluster() as cluster:
        sys.exit(cluster.run(*argv, capture_output=False, timeout=None).returncode)


if __name__ == "__main__":
    main()
