"""What a measurement depends on besides what was asked for: the machine and the versions."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, threads and versions, as JSON-ready data; with a device, it too and an accelerator's name."""
    told: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device is not None:
        told["device"] = str(device)
        if device.type == "cuda":
            told["accelerator"] = torch.cuda.get_device_name(device)
    return told


def _processor() -> str:
    """The processor's name; `platform` knows it on some systems only."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
