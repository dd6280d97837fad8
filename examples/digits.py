"""Classify handwritten digits of 8 x 8 pixels with a small convolutional network; the data come with disttrain.

One worker:   python examples/digits.py
Two workers:  disttrain run -n 2 examples/digits.py
              mpirun -n 2 python examples/digits.py

With ``--compare`` rank 0 then trains alone, and the two results are shown side by side. In float64, the default
here, they are the same to 12 digits; in float32 rounding may change a digit of the test accuracy.
"""

import argparse
import time

import numpy as np

import disttrain as dt


def build_model():
    model = dt.Sequential(
        [
            dt.layers.Conv2D(32, 3, padding="same", activation="relu", input_shape=(8, 8, 1)),
            dt.layers.BatchNormalization(),
            dt.layers.Conv2D(64, 3, padding="same", activation="relu"),
            dt.layers.MaxPooling2D(),
            dt.layers.Flatten(),
            dt.layers.Dropout(0.3),
            dt.layers.Dense(128, activation="relu"),
            dt.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(data, args, callbacks=()):
    """Return the course of the loss, the test accuracy, and training samples per second."""
    (x_train, y_train), (x_test, y_test) = data
    model = build_model()
    start = time.perf_counter()
    history = model.fit(x_train, y_train, epochs=args.epochs, batch_size=args.batch_size, callbacks=list(callbacks))
    rate = args.epochs * len(x_train) / (time.perf_counter() - start)
    _, accuracy = model.evaluate(x_test, y_test)
    return np.array(history.history["loss"]), accuracy, rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64, help="of the global batch, over all workers")
    parser.add_argument("--small", action="store_true", help="one epoch, to see that it runs")
    parser.add_argument("--compare", action="store_true", help="train again on rank 0 alone, and compare")
    parser.add_argument("--checkpoints", help="directory to save training in, and to go on from")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    args = parser.parse_args()
    args.epochs = 1 if args.small else args.epochs

    comm = dt.init()
    dt.backend.set_floatx(args.dtype)
    dt.utils.set_random_seed(0)
    (x_train, y_train), (x_test, y_test) = dt.datasets.digits.load_data()
    data = (x_train[..., None] / 16, y_train), (x_test[..., None] / 16, y_test)

    callbacks = [dt.callbacks.BackupAndRestore(args.checkpoints)] if args.checkpoints else []
    losses, accuracy, rate = train(data, args, callbacks)
    if args.compare and comm.rank == 0:
        print("the same on one worker:")
        with dt.comm.use(dt.comm.connect("local")):
            losses_alone, accuracy_alone, rate_alone = train(data, args)
        print(f"{comm.world_size} workers: test accuracy {accuracy:.4f}, {rate:,.0f} samples/s")
        print(f"1 worker:  test accuracy {accuracy_alone:.4f}, {rate_alone:,.0f} samples/s")
        print(f"largest difference between the two loss curves: {np.abs(losses - losses_alone).max():.1e}")
    comm.barrier()
    if comm.rank == 0:
        print(f"test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
