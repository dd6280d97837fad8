"""The processes of a job, as who disturbs it sees them."""

import shutil
import time

import psutil


def workers_of(process):
    """Return the pids of the ranks that run."""
    found = []
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for child in children:
        try:
            if child.cmdline()[1:4] == ["-P", "-m", "launch.worker"]:
                found.append(child.pid)
        except psutil.Error:
            continue
    return sorted(found)


def await_end_of(job):
    """Wait for the workers of a supervisor that was killed: SIGTERM ends them."""
    end_s = time.monotonic() + 20
    while [left for left in job.left() if "psutil" in left]:
        assert time.monotonic() < end_s, job.left()
        time.sleep(0.05)
    for left in (job.folder / "temporary").iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()  # with which `tempfile` tries a folder
