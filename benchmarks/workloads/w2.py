"""W2: a wide MLP; products, and an optimizer over two million weights."""

from benchmarks.architecture import Dense
from benchmarks.workloads import Optimizer, Workload

WORKLOAD = Workload(
    name="W2",
    title="MLP 784-1024-1024-10, batch 256, Adam",
    parts=(Dense(784, 1024, "relu"), Dense(1024, 1024, "relu"), Dense(1024, 10)),
    input_shape=(256, 784),
    label_shape=(256,),
    classes=10,
    optimizer=Optimizer(name="adam", learning_rate=1e-3),
    learning_steps=10,
)
