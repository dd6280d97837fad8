"""Classify 28 x 28 pictures of clothes with a convolutional network, written as a class.

Data:         disttrain data fashion_mnist
One worker:   python examples/fashion_mnist_cnn.py
Two workers:  disttrain run -n 2 examples/fashion_mnist_cnn.py
              mpirun -n 2 python examples/fashion_mnist_cnn.py
"""

import argparse

import disttrain as dt


class Net(dt.Model):
    """Two convolutions with a pooling after each, and a classifier on top."""

    def __init__(self):
        super().__init__()
        self.conv1 = dt.layers.Conv2D(32, 3, padding="same", activation="relu")
        self.conv2 = dt.layers.Conv2D(64, 3, padding="same", activation="relu")
        self.pool = dt.layers.MaxPooling2D()
        self.norm = dt.layers.BatchNormalization()
        self.flatten = dt.layers.Flatten()
        self.drop = dt.layers.Dropout(0.4)
        self.hidden = dt.layers.Dense(128, activation="relu")
        self.classes = dt.layers.Dense(10, activation="softmax")

    def call(self, x):
        x = self.pool(self.conv1(x))
        x = self.pool(self.norm(self.conv2(x)))
        return self.classes(self.drop(self.hidden(self.flatten(x))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128, help="of the global batch, over all workers")
    parser.add_argument("--small", action="store_true", help="one epoch on 6,000 pictures, to see that it runs")
    parser.add_argument("--checkpoints", help="directory to save training in, and to go on from")
    args = parser.parse_args()

    dt.utils.set_random_seed(0)
    (x_train, y_train), (x_test, y_test) = dt.datasets.fashion_mnist.load_data()
    if args.small:
        args.epochs, x_train, y_train = 1, x_train[:6000], y_train[:6000]
    x_train = x_train[..., None].astype("float32") / 255
    x_test = x_test[..., None].astype("float32") / 255

    model = Net()
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    callbacks = [dt.callbacks.BackupAndRestore(args.checkpoints)] if args.checkpoints else []
    model.fit(
        x_train,
        y_train,
        epochs=args.epochs,
        batch_size=args.batch_size,
        validation_data=(x_test, y_test),
        callbacks=callbacks,
    )
    _, accuracy = model.evaluate(x_test, y_test, batch_size=256)
    if dt.init().rank == 0:
        print(f"test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
