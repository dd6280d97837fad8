"""Have Ray Tune find the learning rate of a digit classifier, each trial trained by Ray Train on as many workers.

    pip install 'disttrain[ray]'
    python examples/ray_tune.py
    python examples/ray_tune.py --workers 2 --address auto    # on a cluster

Trials run side by side as far as there are CPUs. With fewer epochs, ``--small``, it shows that it runs.
"""

import argparse
import os
import tempfile

import ray
import ray.train
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

import disttrain as dt

RATES = [0.0001, 0.001, 0.01, 0.1]


def train(config):
    """Train on each worker of a trial."""
    dt.utils.set_random_seed(0)
    (x, y), test = dt.datasets.digits.load_data()
    layers = [dt.layers.Flatten(input_shape=(8, 8)), dt.layers.Dense(64, "relu"), dt.layers.Dense(10, "softmax")]
    model = dt.Sequential(layers)
    model.compile(dt.optimizers.SGD(config["rate"]), "sparse_categorical_crossentropy", metrics=["accuracy"])
    validation = (test[0] / 16, test[1])
    model.fit(x / 16, y, 64, config["epochs"], verbose=0, validation_data=validation, callbacks=[dt.ray.Report()])


def trial(config):
    """Run one trial: a job of its own, whose values go on to Ray Tune."""
    trainer = dt.ray.DisttrainTrainer(
        train,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=config["workers"]),
        run_config=ray.train.RunConfig(storage_path=config["storage"], callbacks=[TuneReportCallback()]),
    )
    trainer.fit()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="of each trial")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--address", help="of a Ray cluster; by default one on this machine alone")
    parser.add_argument("--storage", help="where trials are kept, which all nodes see; by default nowhere")
    parser.add_argument("--small", action="store_true", help="two epochs, to see that it runs")
    args = parser.parse_args()
    own = {} if args.address else {"num_cpus": 2, "include_dashboard": False}
    ray.init(args.address, **own)
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        storage = os.path.abspath(args.storage or folder)
        space = {
            "rate": ray.tune.grid_search(RATES),
            "epochs": 2 if args.small else args.epochs,
            "workers": args.workers,
            "storage": storage,
        }
        tuner = ray.tune.Tuner(
            # no CPU: its workers have some, and it waits for them
            ray.tune.with_resources(trial, {"memory": 100 << 20}),
            param_space=space,
            tune_config=ray.tune.TuneConfig(metric="val_accuracy", mode="max", max_concurrent_trials=2),
            run_config=ray.tune.RunConfig(storage_path=storage),
        )
        results = tuner.fit()
        for result in results:
            print(f"learning rate {result.config['rate']}: test accuracy {result.metrics['val_accuracy']:.3f}")
        print(f"the best learning rate is {results.get_best_result().config['rate']}")
    ray.shutdown()


if __name__ == "__main__":
    main()
