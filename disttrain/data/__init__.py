"""Samples in the right order, each once an epoch, on any number of ranks; and known data sets."""

from disttrain.data import datasets
from disttrain.data.ledger import Ledger, Order
from disttrain.data.loader import Batch, Batches
from disttrain.data.shard import batch_positions, permute, shard

__all__ = ["Batch", "Batches", "Ledger", "Order", "batch_positions", "datasets", "permute", "shard"]
