"""Hosts of a network that are reached by ssh, each with a real sshd.

with Network(hosts=2) as network, Ssh(network) as ssh:
    subprocess.run(network.command(0, [*ssh.argv, network.addresses[1], "hostname"]))
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from launch import posix

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
START_S = 20.0

_SSHD = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
PidFile none
StrictModes no
UsePAM no
"""
_SSH = """
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class NoSshError(Exception):
    """This machine has no sshd."""


class Ssh(contextlib.AbstractContextManager):
    """An sshd on each host of `network`.

    Attributes:
        argv: the command line of ssh that reaches them.
        daemons: the process of each host's.
    """

    def __init__(self, network):
        self._network = network
        self._folder = tempfile.TemporaryDirectory(prefix="ssh-")
        self.daemons = []
        self.argv = ["ssh", "-F", f"{self._folder.name}/config"]

    def __enter__(self):
        if not os.path.exists(SSHD):
            raise NoSshError("there is no sshd: apt-get install openssh-server")
        folder = Path(self._folder.name)
        for name in ("host", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
        (folder / "config").write_text(_SSH.format(folder=folder))
        Path("/run/sshd").mkdir(exist_ok=True)  # where it separates its privileges
        for host in range(len(self._network.addresses)):
            command = self._network.command(host, [SSHD, "-D", "-e", "-f", folder / "sshd_config"])
            with (folder / f"log.{host}").open("w") as log:
                self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=posix.die_with_parent))
        for address in self._network.addresses:
            self._await(address)
        return self

    def __exit__(self, *error):
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        self._folder.cleanup()

    def _await(self, address):
        end_s = time.monotonic() + START_S
        command = self._network.command(0, [*self.argv, address, "true"])
        while subprocess.run(command, capture_output=True, check=False).returncode:
            if time.monotonic() > end_s:
                raise TimeoutError(f"no sshd at {address}")
            time.sleep(0.1)
