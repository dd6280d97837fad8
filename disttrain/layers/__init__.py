"""Layers, in Keras's vocabulary. Images are channels last."""

from disttrain.layers.activation import Activation, get_activation
from disttrain.layers.batch_normalization import BatchNormalization
from disttrain.layers.bidirectional import Bidirectional
from disttrain.layers.conv2d import Conv2D
from disttrain.layers.dense import Dense
from disttrain.layers.dropout import Dropout
from disttrain.layers.embedding import Embedding
from disttrain.layers.gru import GRU
from disttrain.layers.layer import Layer
from disttrain.layers.layer_normalization import LayerNormalization
from disttrain.layers.lstm import LSTM
from disttrain.layers.masking import Masking
from disttrain.layers.multi_head_attention import MultiHeadAttention
from disttrain.layers.pooling import AveragePooling2D, GlobalAveragePooling2D, MaxPooling2D
from disttrain.layers.reshaping import Flatten
from disttrain.layers.simple_rnn import SimpleRNN
from disttrain.layers.step import Step, current_step, running

__all__ = [
    "GRU",
    "LSTM",
    "Activation",
    "AveragePooling2D",
    "BatchNormalization",
    "Bidirectional",
    "Conv2D",
    "Dense",
    "Dropout",
    "Embedding",
    "Flatten",
    "GlobalAveragePooling2D",
    "Layer",
    "LayerNormalization",
    "Masking",
    "MaxPooling2D",
    "MultiHeadAttention",
    "SimpleRNN",
    "Step",
    "current_step",
    "get_activation",
    "running",
]
