"""Hosts as network namespaces on one machine, with a switch between them: links of a given rate and delay.

    with Network(hosts=2, rate="1gbit") as network:
        done = network.run_tcp([sys.executable, "train.py"], ranks_per_host=1)
        done = network.run_mpi([sys.executable, "train.py"])
        process = subprocess.Popen(network.command(1, ["ping", network.addresses[0]]))

or, for a look, as a program, which runs a command as the ranks of a job, and prints what they write:

    python -m tests.netns.network --hosts 2 --rate 1gbit --transport tcp -- python train.py

Needs root, and a kernel with namespaces, veth, bridge and tbf; nothing of it is left when this process has ended, were
it killed.
"""

import argparse
import contextlib
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from disttrain import env
from launch import posix
from launch.mpirun import find_mpi

INTERFACE = "eth0"
PORT = 29400  # of the rendezvous: each network has its own ports
JOB_S = 300.0


class NoNetworkError(Exception):
    """This machine, or this user, cannot make such a network."""


class Network(contextlib.AbstractContextManager):
    """Hosts with names, addresses and loopbacks of their own; `addresses[0]` is that of host 0.

    Args:
        hosts: how many, at most 200.
        rate: of each link in each direction, as tc has it; empty: no limit.
        delay: of each link in each direction, as tc has it, such as ``"1ms"``; empty: none. Where the kernel has no
            netem there is none either, and `has_delay` is False.
    """

    def __init__(self, hosts=2, rate="1gbit", delay=""):
        self.addresses = [f"10.77.0.{host + 1}" for host in range(hosts)]
        self.has_delay = bool(delay)
        self._rate, self._delay = rate, delay
        self._holders = []  # a process in the namespaces of each host, and of the switch
        self._folder = tempfile.TemporaryDirectory(prefix="netns-")

    def __enter__(self):
        try:
            *_, switch = (self._hold(f"host{host}") for host in range(len(self.addresses) + 1))
            self._inside(switch, "ip link add switch type bridge", "ip link set switch up")
            for host, address in enumerate(self.addresses):
                pid, port = self._holders[host].pid, f"port{host}"
                _run(f"ip link add {INTERFACE} netns {pid} type veth peer name {port} netns {self._holders[-1].pid}")
                self._inside(
                    host,
                    f"ip address add {address}/24 dev {INTERFACE}",
                    f"ip link set {INTERFACE} up",
                    "ip link set lo up",
                )
                self._inside(switch, f"ip link set {port} master switch", f"ip link set {port} up")
                self._limit(host, INTERFACE)
                self._limit(switch, port)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for holder in self._holders:
            holder.kill()
            holder.wait()
        self._folder.cleanup()

    def command(self, host, argv, **environ):
        """Return the command line that runs `argv` on `host`, in the current directory."""
        pid, settings = self._holders[host].pid, [f"{name}={value}" for name, value in environ.items()]
        return [*_enter(pid), "env", f"--chdir={os.getcwd()}", *settings, *argv]

    def run_tcp(self, argv, ranks_per_host=1, **environ):
        """Run `argv` as the ranks of a job over TCP; return the finished process of each, with what it wrote."""
        hosts = [host for host in range(len(self.addresses)) for _ in range(ranks_per_host)]
        job = {env.TRANSPORT: "tcp", env.WORLD_SIZE: len(hosts), env.RENDEZVOUS: f"{self.addresses[0]}:{PORT}"}
        secret = {**os.environ, env.SECRET: secrets.token_hex()}
        deadline_s = time.monotonic() + JOB_S
        with contextlib.ExitStack() as stack:
            ranks = []
            for rank, host in enumerate(hosts):
                out = stack.enter_context(tempfile.TemporaryFile("w+"))
                command = self.command(host, argv, **job, **{env.RANK: rank}, **environ)
                streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
                process = subprocess.Popen(command, env=secret, preexec_fn=posix.die_with_parent, **streams)
                stack.callback(process.wait)
                stack.callback(process.kill)
                ranks.append((process, out))
            return [_finished(process, out, deadline_s) for process, out in ranks]

    def run_mpi(self, argv, ranks_per_host=1, **environ):
        """Run `argv` as the ranks of a job by MPICH's mpiexec; return that, finished, with what they wrote."""
        ssh = Path(self._folder.name) / "ssh"
        cases = [
            f'{address}) exec {shlex.join(_enter(holder.pid))} env --chdir={os.getcwd()} sh -c "$*" ;;'
            for address, holder in zip(self.addresses, self._holders, strict=False)
        ]
        ssh.write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift\ncase $host in\n')
        with ssh.open("a") as file:
            file.write("\n".join([*cases, "esac\n"]))
        ssh.chmod(0o700)
        count = str(len(self.addresses) * ranks_per_host)
        hosts = [
            "-launcher",
            "ssh",
            "-launcher-exec",
            str(ssh),
            "-hosts",
            ",".join(self.addresses),
            "-iface",
            INTERFACE,
        ]
        mpiexec = [find_mpi().mpiexec, *hosts, "-n", count, "-ppn", str(ranks_per_host), *argv]
        # Else UCX recognises the machine, and goes through its memory.
        command = self.command(0, mpiexec, UCX_TLS="tcp,self", **environ)
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=JOB_S, check=False
        )

    def _hold(self, name):
        """Start a process in new namespaces; return its number."""
        # A mount of sysfs shows the interfaces of the namespace in which it was made.
        inside = f"mount -t sysfs none /sys && hostname {name} && echo made && exec sleep infinity"
        command = ["unshare", "--net", "--mount", "--uts", "sh", "-c", inside]
        try:
            holder = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=posix.die_with_parent
            )
        except OSError as error:
            raise NoNetworkError(f"there is no unshare: {error}") from error
        self._holders.append(holder)
        with holder.stdout as out:
            said = out.readline().strip()
        if said != "made":
            raise NoNetworkError(f"namespaces cannot be made: {said}")
        return len(self._holders) - 1

    def _inside(self, host, *commands):
        for command in commands:
            _run(shlex.join(_enter(self._holders[host].pid)) + " " + command)

    def _limit(self, host, device):
        """Limit what `device` sends."""
        if self._rate:
            tbf = f"tbf rate {self._rate} burst 256kb latency 20ms"
            self._inside(host, f"tc qdisc add dev {device} root handle 1: {tbf}")
        if self.has_delay:
            try:
                parent = "parent 1:" if self._rate else "root"
                self._inside(host, f"tc qdisc add dev {device} {parent} netem delay {self._delay} limit 100000")
            except NoNetworkError:
                self.has_delay = False


def _enter(pid):
    return ["nsenter", f"--net=/proc/{pid}/ns/net", f"--mount=/proc/{pid}/ns/mnt", f"--uts=/proc/{pid}/ns/uts"]


def _run(command):
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        raise NoNetworkError(f"{command}: {error}") from error
    if done.returncode:
        raise NoNetworkError(f"{command}: {(done.stderr or done.stdout).strip()}")


def _finished(process, out, deadline_s):
    code = process.wait(max(0, deadline_s - time.monotonic()))
    out.seek(0)
    return subprocess.CompletedProcess(process.args, code, out.read())


def main():
    parser = argparse.ArgumentParser(description="Run a command as the ranks of a job, on hosts that are namespaces.")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--delay", default="")
    parser.add_argument("--transport", choices=["tcp", "mpi"], default="tcp")
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args()
    with Network(asked.hosts, asked.rate, asked.delay) as network:
        if asked.delay and not network.has_delay:
            sys.stderr.write("netem, hence delay, is not in this kernel\n")
        if asked.transport == "tcp":
            done = network.run_tcp(asked.command, asked.ranks_per_host)
        else:
            done = [network.run_mpi(asked.command, asked.ranks_per_host)]
    for each in done:
        sys.stdout.write(each.stdout)
    sys.exit(any(each.returncode for each in done))


if __name__ == "__main__":
    main()
