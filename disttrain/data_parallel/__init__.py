"""Where autodiff and communication meet: flat buffers, and gradients summed over ranks while backward still runs."""

from disttrain.data_parallel.flat import FlatBuffer, flatten
from disttrain.data_parallel.gradients import Bucket, GradientSum
from disttrain.data_parallel.shards import ShardSum, shard_total
from disttrain.data_parallel.sums import broadcast_weights, total_over

__all__ = [
    "Bucket",
    "FlatBuffer",
    "GradientSum",
    "ShardSum",
    "broadcast_weights",
    "flatten",
    "shard_total",
    "total_over",
]
