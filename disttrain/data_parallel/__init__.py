"""Where autodiff and communication meet: flat buffers, gradients summed over ranks, and other ways to agree."""

from disttrain.data_parallel.average import Average
from disttrain.data_parallel.buckets import Bucket
from disttrain.data_parallel.distribution import DataParallel
from disttrain.data_parallel.flat import FlatBuffer, flatten
from disttrain.data_parallel.gradients import GradientSum
from disttrain.data_parallel.shards import ShardSum, shard_total
from disttrain.data_parallel.slices import Slices
from disttrain.data_parallel.sums import broadcast_weights, total_over

__all__ = [
    "Average",
    "Bucket",
    "DataParallel",
    "FlatBuffer",
    "GradientSum",
    "ShardSum",
    "Slices",
    "broadcast_weights",
    "flatten",
    "shard_total",
    "total_over",
]
