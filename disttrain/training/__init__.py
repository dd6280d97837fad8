"""Models and their training."""

from disttrain.training import callbacks
from disttrain.training.loading import load_model
from disttrain.training.model import Model
from disttrain.training.sequential import Sequential

__all__ = ["Model", "Sequential", "callbacks", "load_model"]
