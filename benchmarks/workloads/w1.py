"""W1: a small MLP; what a step costs beside its products."""

from benchmarks.architecture import Dense
from benchmarks.workloads import Optimizer, Workload

WORKLOAD = Workload(
    name="W1",
    title="MLP 784-128-10, batch 128, Adam",
    parts=(Dense(784, 128, "relu"), Dense(128, 10)),
    input_shape=(128, 784),
    label_shape=(128,),
    classes=10,
    optimizer=Optimizer(name="adam", learning_rate=1e-3),
    learning_steps=20,
)
