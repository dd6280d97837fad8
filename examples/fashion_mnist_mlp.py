"""Classify 28 x 28 pictures of clothes with a network of two dense layers.

Data:         disttrain data fashion_mnist
One worker:   python examples/fashion_mnist_mlp.py
Two workers:  disttrain run -n 2 examples/fashion_mnist_mlp.py
              mpirun -n 2 python examples/fashion_mnist_mlp.py
"""

import argparse

import disttrain as dt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128, help="of the global batch, over all workers")
    parser.add_argument("--small", action="store_true", help="one epoch on 6,000 pictures, to see that it runs")
    parser.add_argument("--checkpoints", help="directory to save training in, and to go on from")
    parser.add_argument("--reproducible", action="store_true", help="the same bits on any number of workers; tell them")
    args = parser.parse_args()

    dt.utils.set_random_seed(0)
    (x_train, y_train), (x_test, y_test) = dt.datasets.fashion_mnist.load_data()
    if args.small:
        args.epochs, x_train, y_train = 1, x_train[:6000], y_train[:6000]
    x_train = x_train.reshape(-1, 784).astype("float32") / 255
    x_test = x_test.reshape(-1, 784).astype("float32") / 255
    y_train = dt.utils.to_categorical(y_train, 10)
    y_test = dt.utils.to_categorical(y_test, 10)

    model = dt.Sequential(
        [
            dt.layers.Dense(128, activation="relu", input_shape=(784,)),
            dt.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    model.summary()
    callbacks = [dt.callbacks.BackupAndRestore(args.checkpoints)] if args.checkpoints else []
    model.fit(
        x_train,
        y_train,
        epochs=args.epochs,
        batch_size=args.batch_size,
        validation_data=(x_test, y_test),
        callbacks=callbacks,
        reproducible=args.reproducible,
    )
    _, accuracy = model.evaluate(x_test, y_test, batch_size=1024)
    if dt.init().rank == 0:
        print(f"test accuracy {accuracy:.4f}")
    if args.reproducible:
        print(f"digest {dt.state_digest(model)}")


if __name__ == "__main__":
    main()
