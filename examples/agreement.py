"""Train one model on 1, 2, 3 and 4 workers, and show by how much their loss curves differ.

Workers add the same numbers in another order, so the curves differ by rounding. Training may amplify that, as it
amplifies any small change: with --regularized, which adds dropout and batch normalization, it does. The last line
shows how much: one worker again, after the last bit of one initial weight was changed.

The workers are threads of this process, which compute and communicate as processes under MPI do.

Data:     disttrain data fashion_mnist
Command:  python examples/agreement.py --dtype float64
          python examples/agreement.py --dtype float32
"""

import argparse

import numpy as np

import disttrain as dt
from disttrain.comm import threads


def train(comm, x, y, args, nudge=False):
    """Return the loss of each epoch, and the digest of the weights, on this rank."""
    between = [dt.layers.Dropout(0.2), dt.layers.BatchNormalization()] if args.regularized else []
    model = dt.Sequential(
        [
            dt.layers.Dense(128, activation="relu", input_shape=(784,)),
            *between,
            dt.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    if nudge:
        kernel = model.weights[0].data
        kernel[300, 5] = np.nextafter(kernel[300, 5], np.array(1, kernel.dtype))
    history = model.fit(x, y, epochs=args.epochs, batch_size=args.batch_size, verbose=0)
    return history.history["loss"], dt.state_digest(model)


def listed(differences):
    return " ".join(f"{difference:.0e}" for difference in differences)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128, help="of the global batch, over all workers")
    parser.add_argument("--small", action="store_true", help="two epochs on 6,000 pictures")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--regularized", action="store_true", help="with dropout and batch normalization")
    args = parser.parse_args()

    dt.backend.set_floatx(args.dtype)
    dt.utils.set_random_seed(0)
    (x, y), _ = dt.datasets.fashion_mnist.load_data()
    if args.small:
        args.epochs, x, y = 2, x[:6000], y[:6000]
    x = x.reshape(-1, 784).astype(args.dtype) / 255

    alone = None
    largest = 0.0
    for workers in (1, 2, 3, 4):
        results = threads.run(workers, train, x, y, args)
        curve = np.array(results[0][0])
        if len({digest for _, digest in results}) != 1:
            raise SystemExit(f"the replicas of {workers} workers ended with different weights")
        alone = curve if alone is None else alone
        differences = np.abs(curve - alone)
        largest = max(largest, float(differences.max()))
        print(
            f"{workers} workers: last loss {curve[-1]:.12f}; differences to one worker by epoch: {listed(differences)}"
        )
    print(f"largest difference {largest:.1e}")
    nudged = np.abs(threads.run(1, train, x, y, args, nudge=True)[0][0] - alone)
    print(f"for comparison, 1 worker and the last bit of one weight changed: {listed(nudged)}")


if __name__ == "__main__":
    main()
