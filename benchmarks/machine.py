"""What a figure depends on beside the code: the processor, its instruction sets, the software."""

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve")
# Variables that begin so change which code runs.
_SETTINGS = ("DISTTRAIN_", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "TF_ENABLE_", "TF_XLA_", "TORCH", "XLA_")


def describe(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return the machine as JSON values; `cpuinfo` is where Linux describes the processor."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = set(_field(text, "flags|Features").split())
    return {
        "cpu": _field(text, "model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in found],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],  # other people's work, at the beginning
        "system": platform.platform(),
        "python": platform.python_version(),
        "settings": {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def in_words(machine: dict[str, Any]) -> str:
    """Return the machine in two lines."""
    settings = "".join(f", {name}={value}" for name, value in machine["settings"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags']) or 'no vector instructions known'}\n"
        f"{machine['system']}, Python {machine['python']}, {machine['date']}, load {machine['load']:.2f}{settings}"
    )


def _field(text: str, name: str) -> str:
    match = re.search(rf"^(?:{name})\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""
