"""Predict the logarithm of house prices from features of the houses, by linear regression.

The gradients that the textbook derives by hand are printed beside the ones that autodiff gives.

Data:         disttrain data house_prices
One worker:   python examples/linear_regression.py
Two workers:  disttrain run -n 2 examples/linear_regression.py
              mpirun -n 2 python examples/linear_regression.py
"""

import argparse

import numpy as np

import disttrain as dt


def mean_squared_error(weights, bias, x, y):
    error = x @ weights + bias - y
    return (error * error).mean()


def show_gradients(x, y):
    """Print the gradient of the mean squared error, by hand and by autodiff, at a random place."""
    generator = np.random.default_rng(0)
    weights, bias = generator.normal(size=x.shape[1]), 0.5
    error = x @ weights + bias - y
    by_hand = 2 * x.T @ error / len(x), 2 * error.mean()
    _, by_autodiff = dt.value_and_grad(mean_squared_error, argnums=(0, 1))(weights, np.array(bias), x, y)
    print("gradient of                     2/n X'(Xw + b - y)      by autodiff")
    names = [*dt.datasets.house_prices.FEATURES[:4], "bias"]
    for name, hand, auto in zip(
        names, [*by_hand[0][:4], by_hand[1]], [*by_autodiff[0][:4], by_autodiff[1]], strict=True
    ):
        print(f"{name:28} {hand:21.12f} {auto:16.12f}")
    difference = max(np.abs(by_hand[0] - by_autodiff[0]).max(), abs(by_hand[1] - by_autodiff[1]))
    print(f"largest difference over all {len(weights) + 1} gradients: {difference:.1e}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=256, help="of the global batch, over all workers")
    parser.add_argument("--small", action="store_true", help="two epochs, to see that it runs")
    args = parser.parse_args()
    args.epochs = 2 if args.small else args.epochs

    comm = dt.init()
    dt.utils.set_random_seed(0)
    (x_train, y_train), (x_test, y_test) = dt.datasets.house_prices.load_data()
    center, spread = x_train.mean(axis=0), x_train.std(axis=0)
    x_train, x_test = (x_train - center) / spread, (x_test - center) / spread
    if comm.rank == 0:
        show_gradients(x_train, y_train)

    model = dt.Sequential([dt.layers.Dense(1, input_shape=(x_train.shape[1],))])
    model.compile(optimizer=dt.optimizers.SGD(0.01, momentum=0.9), loss="mse", metrics=["mae"])
    model.fit(x_train, y_train, epochs=args.epochs, batch_size=args.batch_size, verbose=2)
    mse, _ = model.evaluate(x_test, y_test, batch_size=4096)
    if comm.rank == 0:
        print(f"test rmse {np.sqrt(mse):.4f}")


if __name__ == "__main__":
    main()
