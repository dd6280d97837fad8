"""The relay: bytes stay as they are, lines are labelled, and a progress bar lives through it."""

import fcntl
import os
import pty
import re
import struct
import termios

import pytest

from launch.relay import HOLD_S, Sink, Stream, labelled

COLUMNS = 100


@pytest.mark.parametrize(
    ("data", "is_at_beginning", "expected"),
    [
        (b"a\nb\n", True, b"[0] a\n[0] b\n"),
        (b"rest of a line\nb", False, b"rest of a line\n[0] b"),
        (b"a\n\nb\n", True, b"[0] a\n[0] \n[0] b\n"),
        (b"a\r\nb\r\n", True, b"[0] a\r\n[0] b\r\n"),
        (b"bar 1\r\x1b[2Kbar 2", True, b"[0] bar 1\r\x1b[2K[0] bar 2"),
        (b"\x1b[?25l\x1b[32mgreen", True, b"\x1b[?25l[0] \x1b[32mgreen"),
        (b"\r\x1b[2K", False, b"\r\x1b[2K"),
        (b"10%\r20%\r", True, b"[0] 10%\r[0] 20%\r"),
        ("é€😀\n".encode()[3:], False, "é€😀\n".encode()[3:]),
        (b"", True, b""),
    ],
)
def test_labels_stand_where_a_line_begins(data, is_at_beginning, expected):
    assert labelled(data, b"[0] ", is_at_beginning=is_at_beginning) == expected
    assert labelled(data, b"", is_at_beginning=is_at_beginning) == data


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_bytes_stay_as_they_are_wherever_they_are_cut(size):
    data = "bar 1\r\x1b[2Kbar 2 é€😀\n\nline\nunfinished".encode()
    reader, writer = os.pipe()
    stream = Stream(Sink(writer), b"[0] ")
    for at in range(0, len(data), size):
        stream.feed(data[at : at + size], 0.0)
    stream.flush(HOLD_S)
    os.close(writer)
    with open(reader, "rb") as pipe:
        written = pipe.read()
    assert written == b"[0] bar 1\r\x1b[2K" + "[0] bar 2 é€😀\n[0] \n[0] line\n[0] unfinished".encode()


def test_an_unfinished_line_waits_a_moment_for_its_rest():
    reader, writer = os.pipe()
    sink = Sink(writer)
    first, second = Stream(sink, b"[0] "), Stream(sink, b"[1] ")
    first.feed(b"in two ", 0.0)
    first.flush(HOLD_S / 2)
    second.feed(b"whole\n", HOLD_S / 2)
    first.feed(b"pieces\nlate", HOLD_S)
    first.flush(2 * HOLD_S)
    second.feed(b"another\n", 2 * HOLD_S)
    first.feed(b"r\n", 3 * HOLD_S)
    os.close(writer)
    with open(reader, "rb") as pipe:
        lines = pipe.read().splitlines()
    assert lines == [b"[1] whole", b"[0] in two pieces", b"[0] late", b"[1] another", b"[0] r"]


BAR = """
import os, sys, time
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn
rank = int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
def await_file(name):
    while not os.path.exists(name): time.sleep(0.01)
if rank == 0:
    with Progress("training", BarColumn(None), TaskProgressColumn(), console=Console(), expand=True) as progress:
        task = progress.add_task("training", total=3)
        for step in range(3):
            progress.advance(task)
            progress.refresh()
            time.sleep(0.2)
            if step == 0:
                open("shown", "w").close()
                await_file("said")
else:
    await_file("shown")
    print("a line meanwhile")
    open("said", "w").close()
"""


def screen_of(program, *arguments: str) -> tuple[int, str]:
    """Run the program with a terminal of its own; return its exit code and what the terminal was sent."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    program.env |= {"TERM": "xterm", "COLUMNS": ""}
    process = program.start(*arguments, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    sent = b""
    while True:
        try:
            data = os.read(master, 1 << 16)
        except OSError:  # EIO: no process has the terminal any more
            break
        sent += data
    os.close(master)
    return program.finish(process).exit_code, sent.decode()


def drawings(sent: str) -> list[str]:
    """Return the lines as drawn, and redrawn, without what only moves, erases or colours."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    return [line for line in re.split(r"[\r\n]+", plain) if line]


def test_a_progress_bar_is_redrawn_within_the_terminal(program, mpi):
    exit_code, sent = screen_of(program, "run", "-n", "2", program.script(BAR))
    assert exit_code == 0
    lines = drawings(sent)
    bars = [line for line in lines if "%" in line]
    assert len(bars) >= 3
    assert all(line.startswith("[0] training ") for line in bars)
    assert {len(line) for line in bars} == {COLUMNS}
    assert "100%" in bars[-1]
    assert "[1] a line meanwhile" in lines
    # The standing bar was erased for the line, and drawn again below it.
    assert re.search(r"\r\x1b\[2K\[1\] a line meanwhile\r\n[^\n]*\[0\] ", sent)
    assert sent.count("\n") == 2


def test_a_worker_that_is_killed_in_a_progress_bar_leaves_the_terminal_its_cursor(program, mpi):
    text = BAR.replace("time.sleep(0.2)", "os.kill(os.getpid(), 9)")
    exit_code, sent = screen_of(program, "run", program.script(text))
    assert exit_code == 128 + 9
    assert sent.rfind("\x1b[?25l") < sent.rfind("\x1b[?25h")
    assert drawings(sent)[-2].startswith("disttrain: rank 0 of 1, on host")
