"""No line of library and launcher runs what it was given as data, or goes by the wall clock, but those named here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"cloudpickle", "dill", "dbm", "joblib", "marshal", "pickle", "shelve", "yaml", "_pickle"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "runpy.run_path",
    "time.time", "time.time_ns", "datetime.now", "datetime.datetime.now",
}  # fmt: skip
# Of mpi4py: those in lower case pickle what they are given, and unpickle what comes.
MPI_METHODS = {
    "allgather", "allreduce", "alltoall", "bcast", "bsend", "exscan", "gather", "ibsend", "irecv", "isend", "issend",
    "mprobe", "recv", "reduce", "scan", "scatter", "send", "sendrecv", "ssend",
}  # fmt: skip
# NumPy's functions that pickle arrays of objects, unless they are told not to.
NUMPY_FUNCTIONS = {"np.load", "np.save", "read_array", "write_array"}
ALLOWED = {
    ("launch/worker.py", "compile"): "the user's own script",
    ("launch/worker.py", "exec"): "the user's own script",
    ("disttrain/comm/costs.py", "time.time"): "the age of a file",
    ("disttrain/training/ending.py", "time.time"): "Slurm says by it when the job will end",
}


def found_in(text):
    """Return what of this a module with the source `text` uses."""
    tree = ast.parse(text)
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    found = imported & MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{each.name}" for each in node.names} & CALLS
        if isinstance(node, ast.Call):
            found |= set(_uses(node, "mpi4py" in imported))
    return found


def _uses(call, is_of_mpi):
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    last = call.func.attr if owner else getattr(call.func, "id", "")
    keywords = {each.arg: ast.unparse(each.value) for each in call.keywords if each.arg in ("allow_pickle", "shell")}
    name = f"{owner}.{last}" if owner else last
    if name in CALLS:
        yield name
    if {name, last} & NUMPY_FUNCTIONS and keywords.get("allow_pickle") != "False":
        yield f"{last} without allow_pickle=False"
    if keywords.get("shell", "False") != "False":
        yield "shell=True"
    if is_of_mpi and last in MPI_METHODS and owner not in ("", "self", "super()"):
        yield f"mpi4py's {last}"


def test_nothing_runs_what_it_was_given_as_data_nor_goes_by_the_wall_clock():
    found = {
        (str(path.relative_to(ROOT)), what)
        for folder in ("disttrain", "launch")
        for path in (ROOT / folder).rglob("*.py")
        for what in found_in(path.read_text())
    }
    assert found == ALLOWED.keys()


@pytest.mark.parametrize(
    "text",
    ["import pickle", "import yaml.nodes", "from marshal import loads", "def f():\n    from _pickle import Unpickler",
     "eval(text)", "exec(text)", "__import__(name)", "import os\nos.system(text)", "from os import system",
     "from time import time",
     "tempfile.mktemp()", "np.load(path)", "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)",
     "np.lib.format.read_array(file)", "subprocess.run(text, shell=True)", "run(text, shell=flag)",
     "from mpi4py import MPI\nMPI.COMM_WORLD.bcast(x)", "if T:\n    from mpi4py import MPI\nself._world.recv()"],
)  # fmt: skip
def test_the_search_finds(text):
    assert len(found_in(text)) == 1


@pytest.mark.parametrize(
    "text",
    ["import pickletools_", "model.compile()", "re.compile(x)", "np.load(path, allow_pickle=False)", "peer.send(x)",
     "subprocess.run(x, shell=False)", "from mpi4py import MPI\nself._world.Recv(x)\nself.send(x)"],
)  # fmt: skip
def test_the_search_leaves_alone(text):
    assert found_in(text) == set()
