"""A rank that trains over TCP while the test plays with the network: ``python losing.py SILENCE_S``.

At step 20 it leaves its port and pid in `ports.RANK`, and goes on when there is a file `go`. It writes the digest of
its weights, or how long after `go` it learned from what error that it cannot go on.
"""

import os
import sys
import time
from pathlib import Path

import disttrain as dt
from disttrain.comm import tcp
from disttrain.errors import CommError
from tests.training import worlds

tcp._SILENCE_S = float(sys.argv[1])
comm = dt.init()


class Pause(dt.callbacks.Callback):
    def on_train_batch_end(self, batch, logs):
        if model.optimizer.iterations != 20:
            return
        (port, *_) = (pipe._socket.getsockname()[1] for pipe in comm._pipes.values())
        written = Path(f"ports.{comm.rank}.tmp")
        written.write_text(f"{port} {os.getpid()}")
        written.rename(f"ports.{comm.rank}")
        while not Path("go").exists():
            time.sleep(0.01)


model = worlds.dense_net()
x, y = worlds.blobs()
try:
    model.fit(x, y, batch_size=5, epochs=10, verbose=0, reproducible=True, callbacks=[Pause()])
except CommError as error:
    print(f"{time.monotonic() - float(Path('go').read_text()):.1f} {error}")
    comm.abort(1)
print(dt.state_digest(model))
