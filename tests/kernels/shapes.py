"""Shapes of kernels' tests: 1, primes, below and above each block size of disttrain/kernels/cpu.

Blocks: vectors of 4, 8 and 16 floats and pairs of them; tiles of 6 and 8 places, 6 and 12 floats of a run;
chunks of 128 and groups of 256 places; of products tiles of 4, 6 and 14 rows, 384 terms in registers, 512 columns
copied at a time, rows apart by multiples of 2048 bytes.
"""

from typing import NamedTuple

NONE = ((0, 0), (0, 0))
ONE = ((1, 1), (1, 1))
ODD = ((0, 2), (3, 1))


class Shape(NamedTuple):
    images: int
    size: tuple[int, int]
    channels: int
    window: tuple[int, int]
    filters: int
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = NONE

    def __str__(self):
        numbers = [self.images, *self.size, self.channels, *self.window, self.filters, *self.strides]
        return "-".join(map(str, numbers)) + "".join(f"+{a}+{b}" for a, b in self.padding)

    @property
    def out(self):
        return tuple(
            (length + sum(pad) - window) // stride + 1
            for length, window, stride, pad in zip(self.size, self.window, self.strides, self.padding, strict=True)
        )


# results of at least 4 channels: with fewer the definition computes
CONVOLUTIONS = [
    Shape(1, (1, 1), 4, (1, 1), 4),
    Shape(0, (5, 4), 5, (3, 2), 7, padding=ONE),  # an empty batch
    Shape(2, (7, 5), 4, (3, 3), 15),
    Shape(3, (7, 5), 5, (3, 3), 16, padding=ONE),
    Shape(1, (6, 6), 7, (2, 3), 17, padding=ODD),
    Shape(2, (9, 8), 8, (3, 3), 31, (2, 2), ONE),
    Shape(2, (8, 9), 13, (3, 3), 32, (2, 2), ODD),
    Shape(1, (5, 11), 16, (1, 1), 33, (2, 2)),  # phases of the strides without a row of the kernel
    Shape(2, (6, 7), 17, (2, 4), 63, (3, 1)),
    Shape(1, (4, 4), 31, (3, 3), 65, padding=ONE),
    Shape(1, (4, 5), 33, (5, 2), 5, padding=((2, 2), (0, 1))),
    Shape(19, (3, 3), 4, (3, 3), 8, padding=ONE),  # more images than a group, the last one smaller
    Shape(300, (1, 1), 6, (1, 1), 9),
    Shape(1, (127, 1), 4, (1, 1), 4),
    Shape(1, (43, 3), 5, (1, 1), 6),  # 129 places
    Shape(2, (17, 16), 11, (3, 3), 12, padding=ONE),  # 272 places each
    Shape(2, (19, 17), 5, (4, 3), 6),  # the adjoint's borders are skipped: each image is a group
    Shape(2, (17, 19), 4, (5, 2), 8, (1, 1), ((3, 0), (1, 1))),
    Shape(1, (3, 3), 4, (3, 3), 4, (5, 5), ODD),  # strides beyond the image
    Shape(3, (4, 3), 29, (4, 3), 37),  # one place
]

# windows of 3 x 3 and stride 1 for Winograd: tiles partly beyond the image, or of borders only; blocks of 42 tiles, and
# of 64 and more in the adjoint in the kernel
WINOGRAD = [
    Shape(1, (3, 3), 4, (3, 3), 4),  # one place
    Shape(0, (5, 4), 5, (3, 3), 7, padding=ONE),
    Shape(2, (4, 4), 4, (3, 3), 5),
    Shape(1, (1, 1), 16, (3, 3), 15, padding=ONE),
    Shape(2, (5, 6), 17, (3, 3), 16, padding=ONE),
    Shape(1, (6, 7), 8, (3, 3), 31, padding=ODD),
    Shape(1, (2, 2), 7, (3, 3), 6, padding=((4, 5), (3, 4))),  # windows of nothing but padding
    Shape(3, (7, 5), 31, (3, 3), 33, padding=((1, 0), (2, 2))),
    Shape(1, (18, 17), 15, (3, 3), 32, padding=ONE),  # 81 tiles: two blocks
    Shape(43, (2, 2), 13, (3, 3), 8, padding=ONE),  # a tile an image
    Shape(5, (9, 8), 32, (3, 3), 65, padding=((1, 1), (0, 1))),
    Shape(9, (7, 7), 129, (3, 3), 130, padding=ONE),  # blocks of 64 tiles, and a rest
]

# size of the window in place of the kernel's; filters are not used
POOLS = [
    Shape(1, (1, 1), 1, (1, 1), 0),
    Shape(0, (5, 4), 5, (3, 2), 0),
    Shape(2, (6, 8), 64, (2, 2), 0, (2, 2)),
    Shape(2, (7, 5), 3, (2, 2), 0, (2, 2)),  # a rest that no window covers
    Shape(1, (7, 9), 17, (3, 3), 0, (2, 2), ONE),
    Shape(2, (5, 6), 16, (2, 2), 0, (1, 1), ((1, 0), (1, 1))),
    Shape(1, (5, 6), 15, (2, 3), 0, (1, 1)),
    Shape(3, (4, 4), 33, (4, 4), 0, (4, 4)),
    Shape(2, (6, 5), 20, (3, 2), 0, (1, 2), ODD),
    Shape(1, (3, 3), 7, (2, 2), 0, (2, 2), ((2, 1), (0, 3))),  # windows of nothing but padding
]

# m, n, k
PRODUCTS = [
    (1, 1, 1), (2, 3, 5), (4, 4, 4), (5, 17, 3), (6, 16, 8), (7, 9, 33), (14, 32, 16), (15, 33, 17), (13, 31, 127),
    (29, 5, 130), (31, 64, 19), (1, 70, 40), (70, 1, 40), (40, 7, 1), (1, 1, 1025), (3, 2, 384), (17, 11, 385),
    (2, 513, 7), (5, 1031, 3), (515, 3, 9), (700, 4, 2), (30, 523, 389), (61, 13, 512), (40, 40, 1024), (33, 47, 769),
]  # fmt: skip

LENGTHS = [0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 127, 1009, 65_537]

# rows and their length: with and without whole vectors, a last part, blocks of 8 and 16 rows
ROWS = [
    (1, 1),
    (0, 5),
    (3, 2),
    (7, 3),
    (8, 4),
    (9, 7),
    (15, 8),
    (16, 9),
    (17, 15),
    (33, 16),
    (5, 17),
    (4, 31),
    (2, 257),
]


class Attended(NamedTuple):
    samples: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int

    def __str__(self):
        return "-".join(map(str, self))

    @property
    def sizes(self):
        """Shapes of query, key, value and output."""
        s, h, q, k, n, m = self
        return (s, q, h * n), (s, k, h * n), (s, k, h * m), (s, q, h * m)


# blocks: of 32 queries, of 1 << 15 scores
ATTENTIONS = [
    Attended(1, 1, 1, 1, 1, 1),
    Attended(2, 3, 5, 5, 4, 4),
    Attended(2, 1, 7, 3, 5, 2),  # causal: queries that see all
    Attended(1, 2, 3, 19, 1, 17),  # causal: keys that nobody sees
    Attended(2, 2, 33, 33, 16, 16),
    Attended(3, 2, 65, 64, 31, 33),
    Attended(1, 1, 31, 70, 64, 1),
    Attended(1, 1, 9, 9001, 3, 2),  # blocks of 3 queries
    Attended(2, 2, 37, 40, 8, 8),
]


class Sequences(NamedTuple):
    samples: int
    steps: int
    features: int
    units: int

    def __str__(self):
        return "-".join(map(str, self))


SEQUENCES = [
    Sequences(1, 1, 1, 1),
    Sequences(0, 3, 2, 2),
    Sequences(2, 2, 3, 4),
    Sequences(3, 5, 4, 15),
    Sequences(17, 3, 5, 16),
    Sequences(2, 7, 33, 17),
    Sequences(5, 4, 1, 40),
    Sequences(1, 33, 8, 3),
]
