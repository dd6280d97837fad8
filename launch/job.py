"""A job as values: what is to run, on how many workers, and the command lines that start it."""

import importlib
import os
import pkgutil
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType

import launch
from disttrain import env
from disttrain.errors import ConfigError, LaunchError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to run.

    Attributes:
        workers: number of processes.
        script: path of the user's script.
        arguments: the script's own arguments, passed on unchanged.
        launcher: a module of this package, or a dotted path; empty chooses by `workers`.
        transport: how workers communicate; empty: as the launcher and their environment say.
        python: the interpreter that runs the workers.
        hang_timeout_s: how long a rank may hold up the others in a step; other limits are multiples of it; 0: for ever.
        max_restarts: how many times it is started again after a failure.
        min_workers: with how few it may go on where more cannot be started; 0: with no fewer than `workers`.
        max_workers: how many a restart asks for; 0: `workers`.
        options: what the launcher is told beside, by name.
    """

    workers: int
    script: str
    arguments: tuple[str, ...] = ()
    launcher: str = ""
    transport: str = ""
    python: str = sys.executable
    hang_timeout_s: float = 5.0
    max_restarts: int = 0
    min_workers: int = 0
    max_workers: int = 0
    options: dict[str, str] = field(default_factory=dict)

    def words(self, option: str) -> list[str]:
        """Return the value of an option as the words that a shell makes of it.

        Raises:
            ConfigError: a quote in it does not end.
        """
        try:
            return shlex.split(self.options.get(option, ""))
        except ValueError as error:
            raise ConfigError(f"-o {option}={self.options[option]}: {error}") from error

    @property
    def worker(self) -> tuple[str, ...]:
        """The command line of one worker."""
        # -P: a folder `launch` in the current directory must not take this package's place.
        return (self.python, "-P", "-m", "launch.worker", self.script, *self.arguments)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line, what it adds to the environment, and the signal that has it pass on a wish for the end."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    asked: signal.Signals = signal.SIGTERM


def across_hosts(job: Job, line: Command, host: str, secret: str, environ: Mapping[str, str]) -> Command:
    """Return `line`, which starts the workers of `job` on several hosts, run by what hears of those on other hosts.

    Args:
        job: what is run.
        line: of a launcher that passes on the environment.
        host: one of them, as this one knows it; empty: none is known.
        secret: by which workers are known, if `environ` has none.
        environ: the user's.
    """
    gate = (job.python, "-P", "-m", "launch.gate", str(job.workers), host)
    settings = {} if env.secret(environ) or env.secret_file(environ) else {env.SECRET: secret}
    return replace(line, argv=(*gate, *line.argv), env={**line.env, **settings})


def as_shell(job: Job) -> str:
    """Return what would be executed for `job`, as lines that a shell can run.

    Raises:
        ConfigError, LaunchError: as `commands`.
    """
    lines = commands(job)
    settings = {env.TRANSPORT: job.transport} if job.transport else {}
    text = [f'export {env.JOB_DIR}="$(mktemp -d)"  # private; disttrain run removes it at the end']
    text += [f"export {_setting(name, value)}" for name, value in settings.items()]
    for line in lines:
        words = [*(_setting(name, value) for name, value in line.env.items()), shlex.join(line.argv)]
        text.append(" ".join(words) + (" &" if len(lines) > 1 else ""))
    return "\n".join([*text, *(["wait"] if len(lines) > 1 else [])])


def _setting(name: str, value: str) -> str:
    if name == env.SECRET:
        return f'{name}="$(openssl rand -hex 32)"'  # another one each time, and none that is shown
    return f"{name}={shlex.quote(value)}"


def commands(job: Job) -> list[Command]:
    """Return the command lines that start `job`, as its launcher writes them.

    Raises:
        ConfigError: there is no launcher of this name, or it has no such option.
        LaunchError: the launcher cannot start this job, or cannot be imported.
    """
    name = job.launcher or ("local" if job.workers == 1 else _for_several())
    launcher = _launcher(name)
    known = getattr(launcher, "OPTIONS", ())
    for option in job.options:
        if option not in known:
            raise unknown_name(f"option of --launcher {name}:", option, known or ["none"])
    lines: list[Command] = launcher.commands(job)
    return lines


def _for_several() -> str:
    """Return the launcher of more than one worker, where none is asked for: an MPI's, else Ray's."""
    from launch import mpirun, ray  # they import this module

    try:
        mpirun.find_mpi()
    except LaunchError:
        if not ray.is_installed():
            raise
        print(
            "disttrain: there is no MPI here, so Ray starts the workers; --launcher local does without", file=sys.stderr
        )
        return "ray"
    return "mpirun"


def _launcher(name: str) -> ModuleType:
    """Return the module of the launcher `name`: the file name is the registration."""
    if "." in name:
        return _imported(name)
    modules = [module.name for module in pkgutil.iter_modules(launch.__path__)]
    if name in modules and (found := _with_commands(f"launch.{name}")):
        return found
    raise unknown_name("launcher", name, [each for each in modules if _with_commands(f"launch.{each}")])


def _imported(path: str) -> ModuleType:
    """Return the user's own module `path`."""
    sys.path.append(os.getcwd())  # the program is not a script: its path lacks the current directory
    try:
        found = _with_commands(path)
    except ImportError as error:
        raise LaunchError(f"launcher {path!r} cannot be imported: {error}") from error
    if found is None:
        raise LaunchError(f"launcher {path!r} has no function commands(job); see docs/launching.md")
    return found


def _with_commands(name: str) -> ModuleType | None:
    """Return the module `name`, None where it defines no function `commands` of its own."""
    module = importlib.import_module(name)
    return module if getattr(module, "commands", commands) is not commands else None
