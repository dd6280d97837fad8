"""DataParallel: how replicas of a model are kept alike, as one value that `Model.compile` takes."""

from dataclasses import dataclass
from typing import Any

from disttrain.data_parallel import compression as compressions
from disttrain.data_parallel.compression import Compression
from disttrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """How ranks that train one model share the work, and what they tell each other.

    Args:
        compression: of gradients that travel between hosts: ``"float16"``, ``"bfloat16"``, ``"int8"``, ``"powersgd"``,
            ``"topk"``, or a Compression with settings of its own. Sums in memory that ranks share are never rounded.
        local_steps: how many steps each rank takes by itself before weights are averaged. With 1 gradients are summed
            in each step. Source: Stich, "Local SGD converges fast and communicates little", 2019.
        shard_optimizer: whether each rank keeps the optimizer's state of its part of the weights only, and updates
            that part. Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
            models", 2020, stage 1.
        bucket_bytes: least size of the gradients that are summed in one call while backward goes on. None: 4 MiB, or,
            where sums travel between hosts, what a step's timeline and the costs of messages suggest.

    Raises:
        ConfigError: an unknown compression, a number that is none, or what excludes each other.
    """

    compression: str | Compression | None = None
    local_steps: int = 1
    shard_optimizer: bool = False
    bucket_bytes: int | None = None

    def __post_init__(self) -> None:
        """Check."""
        compressions.get(self.compression)
        for name in ("local_steps", "bucket_bytes"):
            number = getattr(self, name)
            if name == "bucket_bytes" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"DataParallel: {name} must be an integer of at least 1, not {number!r}")
        if not isinstance(self.shard_optimizer, bool):
            raise ConfigError(f"DataParallel: shard_optimizer is True or False, not {self.shard_optimizer!r}")
        if self.shard_optimizer and self.local_steps > 1:
            raise ConfigError(
                f"DataParallel: with local_steps={self.local_steps} each rank updates all weights by itself, and "
                "shard_optimizer=True leaves it a part of them: choose one"
            )
        if self.shard_optimizer and self.compression is not None:
            raise ConfigError(
                f"DataParallel: shard_optimizer=True sends weights, which compression={self.compression!r} would round "
                "in each step: choose one"
            )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this again, as JSON values."""
        chosen = compressions.get(self.compression)
        return {
            "compression": chosen and {"class": type(chosen).__name__, "config": chosen.get_config()},
            "local_steps": self.local_steps,
            "shard_optimizer": self.shard_optimizer,
            "bucket_bytes": self.bucket_bytes,
        }
