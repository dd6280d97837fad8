"""A rank that joins a job when the test lets it, and says at which addresses its Python code has listened.

Files tell the test where it is, and it where the test is: `begun.RANK`, `join`, `dialing`, `dial`, `joined.RANK`, and
`end`.
"""

import json
import sys
import time
from pathlib import Path

bound = []
sys.addaudithook(lambda event, args: bound.append(args[1]) if event == "socket.bind" else None)

import numpy as np  # noqa: E402 - what it does is heard too

import disttrain as dt  # noqa: E402
from disttrain import env  # noqa: E402
from disttrain.comm import tcp  # noqa: E402

RANK, LIMIT_S = env.place().rank, 60.0


def await_file(name):
    end_s = time.monotonic() + LIMIT_S
    while not Path(name).exists():
        assert time.monotonic() < end_s, f"the test has not said {name}"
        time.sleep(0.01)


def dial(*args):
    Path("dialing").touch()  # now all ranks listen
    await_file("dial")
    return connect(*args)


connect, tcp.dial = tcp.dial, dial
Path(f"begun.{RANK}").touch()
await_file("join")
comm = dt.init()
comm.all_reduce(np.ones(10**5))
Path(f"joined.{RANK}").touch()
await_file("end")
comm.all_reduce(np.ones(10**5))
print(json.dumps([RANK, bound]))
