"""W4: ResNet-18 in its form for small images; deep convolutions, batch normalization, residual sums.

Source: He et al., "Deep residual learning for image recognition", 2015; a first convolution of 3 x 3, no pooling.
"""

from benchmarks.architecture import BatchNorm, Conv, Dense, GlobalMean, Part, Residual
from benchmarks.workloads import Optimizer, Workload


def _block(channels: int, filters: int, stride: int) -> Residual:
    shortcut: tuple[Part, ...] = ()
    if stride != 1 or channels != filters:
        shortcut = (Conv(channels, filters, 1, stride, use_bias=False), BatchNorm(filters))
    return Residual(
        branch=(
            Conv(channels, filters, 3, stride, padding=1, use_bias=False),
            BatchNorm(filters, "relu"),
            Conv(filters, filters, 3, padding=1, use_bias=False),
            BatchNorm(filters),
        ),
        shortcut=shortcut,
        activation="relu",
    )


WORKLOAD = Workload(
    name="W4",
    title="ResNet-18 on 32x32x3, batch 64, SGD with momentum",
    parts=(
        Conv(3, 64, 3, padding=1, use_bias=False),
        BatchNorm(64, "relu"),
        _block(64, 64, 1),
        _block(64, 64, 1),
        _block(64, 128, 2),
        _block(128, 128, 1),
        _block(128, 256, 2),
        _block(256, 256, 1),
        _block(256, 512, 2),
        _block(512, 512, 1),
        GlobalMean(),
        Dense(512, 10),
    ),
    input_shape=(64, 32, 32, 3),
    label_shape=(64,),
    classes=10,
    optimizer=Optimizer(name="sgd", learning_rate=0.01, momentum=0.9),
    learning_steps=3,
)
