"""Jobs that succeed: what a script finds, and what becomes of its output."""

import json
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("mpi")

PLACE = """
import json, os, sys
import beside
print(json.dumps([__name__, sys.argv, sys.path[0], __file__, sys.modules["__main__"].__file__, beside.NAME, __spec__]))
"""


def test_two_workers_write_lines_with_their_rank(program):
    script = program.script("import sys; print('to out'); print('to err', file=sys.stderr)")
    done = program.run("run", "-n", "2", script)
    assert done.exit_code == 0
    assert sorted(done.out.splitlines()) == ["[0] to out", "[1] to out"]
    assert sorted(done.err.splitlines()) == ["[0] to err", "[1] to err"]


@pytest.mark.parametrize("launcher", ["local", "mpirun"])
def test_the_only_worker_writes_as_it_would_alone(program, launcher):
    script = program.script("import sys; print('to out'); sys.stderr.write('unfinished')")
    done = program.run("run", "--launcher", launcher, script)
    assert (done.exit_code, done.out, done.err) == (0, "to out\n", "unfinished")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_arguments_reach_the_script_unchanged(program, workers):
    arguments = ["a b", "", "--epochs", "3", "-n", "5", "--", "--launcher", "ssh", "*", "$HOME", "é", '"', "two\nlines"]
    script = program.script("import json, sys; open(sys.argv[1], 'w').write(json.dumps(sys.argv))")
    done = program.run("run", "-n", workers, script, "argv.json", *arguments)
    assert done.exit_code == 0, done.err
    assert json.loads((program.folder / "argv.json").read_text()) == [script, "argv.json", *arguments]


@pytest.mark.parametrize("linked", [False, True])
def test_a_script_finds_what_python_would_give_it(program, linked):
    (program.folder / "inner").mkdir()
    program.script("NAME = 'beside'", "inner/beside.py")
    script = program.script(PLACE, "inner/script.py")
    if linked:
        (program.folder / "link.py").symlink_to(script)
        script = "link.py"
    started = program.start("run", script, "x")
    by_disttrain = program.finish(started).out
    by_python = subprocess.check_output([sys.executable, script, "x"], cwd=program.folder, text=True)
    assert by_disttrain == by_python
    assert json.loads(by_python)[0] == "__main__"


def test_a_folder_named_launch_where_the_job_starts_does_not_disturb(program):
    (program.folder / "launch").mkdir()
    program.script("raise SystemExit('the wrong package')", "launch/__init__.py")
    assert program.run("run", "-n", "2", program.script("print('fine')")).out.count("fine") == 2


def test_processes_and_exit_handlers_of_a_script_find_its_main_module(program):
    text = """
import atexit, multiprocessing
def square(x): return x * x
if __name__ == "__main__":  # the pool's process imports this file too, and may or may not live to its exit handlers
    atexit.register(lambda: print("bye", square(3)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [2]))
"""
    done = program.run("run", program.script(text))
    assert (done.exit_code, done.out) == (0, "[4]\nbye 9\n"), done.err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_of_many_writers_stay_whole(program, unbuffered):
    text = "import os\nfor i in range(3000): print('<', i, 'é€😀' * (i % 50), '>')"
    program.env["PYTHONUNBUFFERED"] = unbuffered
    done = program.run("run", "-n", "2", program.script(text))
    assert done.exit_code == 0
    for rank in (0, 1):
        mine = [line for line in done.out.splitlines() if line.startswith(f"[{rank}] ")]
        assert mine == [f"[{rank}] < {i} {'é€😀' * (i % 50)} >" for i in range(3000)]


@pytest.mark.parametrize(
    ("write", "expected"),
    [("print('a line')", "a line\n"), ("sys.stdout.write('unfinished'); sys.stdout.flush()", "unfinished")],
)
def test_output_is_passed_on_while_the_script_waits(program, write, expected):
    wait = "while not os.path.exists('seen'): time.sleep(0.01)"
    program.env["PYTHONUNBUFFERED"] = ""
    process = program.start("run", program.script(f"import os, sys, time\n{write}\n{wait}\nprint('done')"))
    assert process.stdout is not None
    assert process.stdout.read(len(expected)) == expected  # never comes if it is kept back
    (program.folder / "seen").touch()
    assert program.finish(process).out == "done\n"


def test_the_folder_of_a_job_is_private(program):
    script = program.script("import os; print(oct(os.stat(os.environ['DISTTRAIN_JOB_DIR']).st_mode & 0o777))")
    assert program.run("run", script).out == "0o700\n"


def test_a_launcher_of_the_users_own_serves_by_its_dotted_path(program):
    text = """
from launch.job import Command, Job
def commands(job: Job) -> list[Command]:
    place = lambda rank: {"PMI_RANK": str(rank), "PMI_SIZE": str(job.workers)}
    return [Command(argv=job.worker, env=place(rank)) for rank in range(job.workers)]
"""
    (program.folder / "mine").mkdir()
    program.script(text, "mine/forked.py")
    done = program.run("run", "-n", "3", "--launcher", "mine.forked", program.script("print('hello')"))
    assert done.exit_code == 0, done.err
    assert sorted(done.out.splitlines()) == ["[0] hello", "[1] hello", "[2] hello"]


def test_a_process_that_a_script_left_behind_ends_with_the_job(program):
    text = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    assert program.run("run", program.script(text)).exit_code == 0  # the fixture looks for it


def test_help_shows_examples(program):
    done = program.run("run", "--help")
    assert done.exit_code == 0
    assert re.search(r"^ +disttrain run -n 4 train.py --epochs 3$", done.out, re.MULTILINE)
    assert program.run("--version").out.startswith("disttrain, version ")
