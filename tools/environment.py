"""Where and when a figure was made."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

import swalp_fx

__all__ = ["environment", "machine"]


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, machine, threads and date, as JSON holds them."""
    return {
        "swalp_fx": swalp_fx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "machine": machine(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


def machine(device: torch.device | str = "cpu") -> str:
    """The name of the GPU, or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
