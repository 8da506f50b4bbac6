"""What the machine does besides: its cache, who else uses its cores, its free memory. Linux files only."""

from __future__ import annotations

import os
import time
from pathlib import Path

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
DEFAULT_CACHE = 64 << 20  # where the system does not say


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core."""
    sizes = []
    for file in CACHES.glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * UNITS.get(text[-1:], 1))
    return max(sizes, default=DEFAULT_CACHE)


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def load() -> float:
    """How many processes ran or wanted to in the last minute."""
    return os.getloadavg()[0]


class Quiet:
    """Counts from its creation what others took from us."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.before = ticks()

    def figures(self) -> dict[str, float]:
        """In cores: what other processes used (`others`), and what the hypervisor gave to other machines (`stolen`)."""
        elapsed = max(1e-9, time.monotonic() - self.began)
        busy, stolen, own = (after - before for after, before in zip(ticks(), self.before, strict=True))
        return {"others": max(0.0, busy - own) / elapsed, "stolen": stolen / elapsed}


def ticks() -> tuple[float, float, float]:
    """CPU seconds so far: all processes, stolen, this process."""
    fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, softirq, stolen = fields[:8]
    clock = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / clock, stolen / clock, time.process_time()
