"""W5: a small GPT; attention, layer normalization, GELU, and logits for every token.

Source: Radford et al., "Language models are unsupervised multitask learners", 2019.
"""

from benchmarks.architecture import Attention, Dense, Embedding, LayerNorm, Part, Residual
from benchmarks.workloads import Optimizer, Workload

_WIDTH, _HEADS, _BLOCKS, _LENGTH, _VOCABULARY = 256, 4, 4, 128, 256
_BLOCK: tuple[Part, ...] = (
    Residual((LayerNorm(_WIDTH), Attention(_WIDTH, _HEADS))),
    Residual((LayerNorm(_WIDTH), Dense(_WIDTH, 4 * _WIDTH, "gelu"), Dense(4 * _WIDTH, _WIDTH))),
)

WORKLOAD = Workload(
    name="W5",
    title="GPT, 4 blocks of 256 with 4 heads, sequence 128, batch 8, AdamW",
    parts=(
        Embedding(_VOCABULARY, _WIDTH, _LENGTH),
        *(_BLOCK * _BLOCKS),
        LayerNorm(_WIDTH),
        Dense(_WIDTH, _VOCABULARY, use_bias=False),
    ),
    input_shape=(8, _LENGTH),
    vocabulary=_VOCABULARY,
    label_shape=(8, _LENGTH),
    classes=_VOCABULARY,
    optimizer=Optimizer(name="adamw", learning_rate=1e-3, weight_decay=0.1),
    learning_steps=5,
)
