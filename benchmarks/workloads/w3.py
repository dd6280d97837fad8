"""W3: a small CNN; convolutions with few channels, a pooling."""

from benchmarks.architecture import Conv, Dense, Flatten, MaxPool
from benchmarks.workloads import Optimizer, Workload

WORKLOAD = Workload(
    name="W3",
    title="CNN conv32-conv64-pool-dense128-dense10 on 28x28x1, batch 128, Adam",
    parts=(
        Conv(1, 32, 3, activation="relu"),
        Conv(32, 64, 3, activation="relu"),
        MaxPool(2),
        Flatten((12, 12, 64)),
        Dense(9216, 128, "relu"),
        Dense(128, 10),
    ),
    input_shape=(128, 28, 28, 1),
    label_shape=(128,),
    classes=10,
    optimizer=Optimizer(name="adam", learning_rate=1e-4),
    learning_steps=5,
)
