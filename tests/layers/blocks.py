"""Blocks with residuals, as users write them: subclasses of Layer."""

from disttrain import layers, ops


class BasicBlock(layers.Layer):
    """The block of ResNet-18: two convolutions and a way around them."""

    def __init__(self, filters, strides=1, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.strides = filters, strides
        dtype = {"dtype": self.dtype}
        conv = {"padding": "same", "use_bias": False, **dtype}
        self.conv1 = layers.Conv2D(filters, 3, strides, **conv)
        self.norm1 = layers.BatchNormalization(**dtype)
        self.conv2 = layers.Conv2D(filters, 3, **conv)
        self.norm2 = layers.BatchNormalization(**dtype)
        self.shortcut = [layers.Conv2D(filters, 1, strides, **conv), layers.BatchNormalization(**dtype)]

    def call(self, x):
        y = self.norm2(self.conv2(ops.relu(self.norm1(self.conv1(x)))))
        if self.strides != 1 or x.shape[-1] != self.filters:
            for layer in self.shortcut:
                x = layer(x)
        return ops.relu(x + y)


class GPTBlock(layers.Layer):
    """Attention to what came before and a network of two layers, each behind a normalization and with a way around."""

    def __init__(self, width, heads, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.width, self.heads, self.dropout = width, heads, dropout
        dtype = {"dtype": self.dtype}
        self.norm1 = layers.LayerNormalization(epsilon=1e-5, **dtype)
        self.attention = layers.MultiHeadAttention(heads, width // heads, dropout=dropout, **dtype)
        self.norm2 = layers.LayerNormalization(epsilon=1e-5, **dtype)
        self.wide = layers.Dense(4 * width, "gelu", **dtype)
        self.narrow = layers.Dense(width, **dtype)

    def call(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, use_causal_mask=True)
        return x + self.narrow(self.wide(self.norm2(x)))
